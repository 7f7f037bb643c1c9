#!/usr/bin/env bash
# English to German on Multi30k (29,000 image captions): dense, EvoMoE and others from one script.
#
#   bash recipes/multi30k/run.sh --model evomoe            downloads the data
#   bash recipes/multi30k/run.sh --model dense --data DIR  DIR/{train,valid,test2016,test2017}.{en,de}
#
# docs/evidence.md, "A recipe run longer", has results of 1000 updates of the default size on 2 CPU cores.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/multi30k
size=small updates=1000 average=4 experts=4 search="--beam 5 --max-tokens 8000"
. recipes/lib/corpus_recipe.sh
