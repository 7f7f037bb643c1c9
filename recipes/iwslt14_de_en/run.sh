#!/usr/bin/env bash
# IWSLT14 German-English: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/iwslt14_de_en/run.sh --model evomoe
#
# 0.17 million pairs, cased and detokenised (the customary 34 to 35 BLEU is of lower-cased, tokenised
# text and does not compare). One GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/iwslt14_de_en
size=iwslt updates=30000 average=5 experts=4 search="--beam 5 --max-tokens 8000"
. recipes/corpus_recipe.sh
