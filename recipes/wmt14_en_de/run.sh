#!/usr/bin/env bash
# WMT14 English-German: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt14_en_de/run.sh --model evomoe
#
# 4.5 million pairs. Quoted, not measured here: Transformer base 27.3 BLEU, big 28.4 on newstest2014
# (arXiv 1706.03762, tokenised); fairseq big 28.6 sacreBLEU. The base model takes about 25,000 target
# tokens an update, the big one 400,000 (--update-freq 16 on 8 GPUs). On 8 GPUs of one node:
#   bash recipes/wmt14_en_de/run.sh --steps download,extract,clean,pieces,preprocess
#   torchrun --nproc-per-node 8 $(which fairseq-train) <what --print prints, after fairseq-train>
# Slurm: srun --ntasks-per-node 8 with the same flags and --distributed-port 29500.
set -euo pipefail
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt14_en_de
size=base updates=100000 average=5 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/corpus_recipe.sh
