#!/usr/bin/env bash
# WMT17 English-German: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt17_en_de/run.sh --model evomoe
#
# 5.9 million pairs; valid newstest2016, test newstest2017. The best single system of 2017 in
# shared results, LMU, has 26.56 sacreBLEU on newstest2017, uedin 28.30 (their outputs, rescored).
# Several GPUs: as in recipes/wmt14_en_de/run.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt17_en_de
size=base updates=100000 average=5 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/corpus_recipe.sh
