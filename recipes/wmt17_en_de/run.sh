#!/usr/bin/env bash
# WMT17 English-German: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt17_en_de/run.sh --model evomoe
#
# 5.9 million pairs; valid newstest2016, test newstest2017. Systems of
# 2017 on newstest2017, their outputs rescored with sacreBLEU: LMU 26.56, uedin 28.30.
# Several GPUs: as in recipes/wmt14_en_de/run.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt17_en_de
size=base updates=100000 average=5 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/corpus_recipe.sh
