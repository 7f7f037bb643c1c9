#!/usr/bin/env bash
# WMT17 English-German: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt17_en_de/run.sh --model evomoe
#
# 5.9 million pairs. The validation set is newstest2016, the test set newstest2017. BLEU of systems of 2017
# on newstest2017, whose outputs were rescored with sacreBLEU: LMU 26.56, uedin 28.30.
# For several GPUs see recipes/wmt14_en_de/run.sh.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt17_en_de
size=base updates=100000 average=5 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/lib/corpus_recipe.sh
