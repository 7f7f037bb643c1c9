#!/usr/bin/env bash
# WMT14 English-German: download, clean, sentencepiece, train, average, translate, score.
#
#   bash recipes/wmt14_en_de/run.sh --model evomoe
#
# 4.5 million pairs. Published BLEU on newstest2014, not measured here: Transformer base 27.3, big 28.4
# (arXiv 1706.03762, tokenised); fairseq big 28.6 (sacreBLEU). The base model uses about 25,000 target
# tokens per update, the big one 400,000 (--update-freq 16 on 8 GPUs). On 8 GPUs of one node:
#   bash recipes/wmt14_en_de/run.sh --steps download,extract,clean,pieces,preprocess
#   torchrun --nproc-per-node 8 $(which fairseq-train) <output of --print, after fairseq-train>
# With Slurm, use srun --ntasks-per-node 8 with the same flags and --distributed-port 29500.
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."
RECIPE=recipes/wmt14_en_de
size=base updates=100000 average=5 experts=8 search="--beam 4 --lenpen 0.6 --max-tokens 8000"
. recipes/lib/corpus_recipe.sh
