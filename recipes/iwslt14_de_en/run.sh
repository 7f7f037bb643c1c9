#!/usr/bin/env bash
# IWSLT14 German-English: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/iwslt14_de_en/run.sh --model evomoe
#
# 0.17 million pairs, cased and detokenised. The usual 34 to 35 BLEU is measured on lower-cased, tokenised
# text and cannot be compared. The recipe is meant for one GPU.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/iwslt14_de_en
size=iwslt updates=30000 average=5 experts=4 search="--beam 5 --max-tokens 8000"
. recipes/lib/corpus_recipe.sh
