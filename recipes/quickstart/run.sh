#!/usr/bin/env bash
# Trains an EvoMoE translation model from scratch on a laptop and computes its BLEU.
#
#   bash recipes/quickstart/run.sh                       uses the built-in English-German grammar
#   bash recipes/quickstart/run.sh --data DIR --source-lang xx --target-lang yy
#                                                        uses your own DIR/{train,valid,test}.{xx,yy}
#   options: --updates N (1000)  --vocab N (1000)  --max-tokens N (1536)  --seed N (1)
#            --out DIR (work/quickstart)  --remake (delete results in --out that were made with other options)
#            --long-lines stop|cut (stop)  -- further flags of fairseq-train
set -euo pipefail
CALLER=$PWD
cd "$(dirname "$0")/../.."

usage() { sed -n '2,11s/^# \{0,1\}//p' recipes/quickstart/run.sh >&2; }
. recipes/lib/options.sh
data= source_lang=en target_lang=de updates=1000 vocab=1000 max_tokens=1536 seed=1 long_lines=stop remake= out= devices=
parse_options "data source-lang target-lang updates vocab max-tokens seed long-lines out" "remake" "$@"
data=$(folder_from_caller --data "$data") || exit 2
WORK=$(from_caller "$out")
WORK=${WORK:-$PWD/work/quickstart}
src=$source_lang tgt=$target_lang

extras=plots . recipes/lib/environment.sh
. recipes/lib/made_from.sh
. recipes/lib/translation.sh
start=$SECONDS

flags=(
    --task translation_evomoe --source-lang "$src" --target-lang "$tgt"
    --arch transformer_evomoe --encoder-layers 2 --decoder-layers 2
    --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --moe-freq 2 --moe-expert-count 4
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1
    --dropout 0.1 --optimizer adam --adam-betas '(0.9, 0.98)'
    --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 150
    --max-tokens "$max_tokens" --max-update "$updates" --seed "$seed"
    --save-interval-updates $((updates / 20 > 0 ? updates / 20 : 1)) --keep-interval-updates 4
    --no-epoch-checkpoints --log-interval 10 "${rest[@]}"
)
pieces=$(most_pieces "${flags[@]}")

if [ -z "$data" ]; then
    data=$WORK/corpus
    tests=(test test_comp)
    inputs=("grammar=recipes/quickstart/grammar.py")
else
    tests=(test)
    inputs=()
    for split in train valid test; do
        inputs+=("$split.$src=$data/$split.$src" "$split.$tgt=$data/$split.$tgt")
    done
fi
made_from data --files "${inputs[@]}" --values source="$src" target="$tgt" vocab="$vocab" \
    most_pieces="$pieces" long_lines="$long_lines" --versions sentencepiece fairseq-evomoe \
    --results "$WORK"/{corpus,text,pieces,bin,model}
made_from model --results "$WORK/model" --versions torch fairseq-fixed ve-fairseq fairseq-evomoe --flags "${flags[@]}"

[ "$data" != "$WORK/corpus" ] || [ -e "$data/test_comp.de" ] || python recipes/quickstart/grammar.py --out "$data"
mkdir -p "$WORK/text"
[ -e "$WORK/text/clean.$tgt" ] || python recipes/steps/clean.py --source-lang "$src" --target-lang "$tgt" \
    --train "$data/train" --held-out "${tests[@]/#/$data/}" --out "$WORK/text/clean"
pieces "$src" "$tgt" "$vocab" "$WORK/text/clean" "$data/valid" "${tests[@]/#/$data/}" -- \
    --max-pieces "$pieces" --long-lines "$long_lines"
preprocess "$src" "$tgt" "${#tests[@]}"

if [ ! -e "$WORK/model/averaged.pt" ]; then
    echo "training: $updates updates"
    rm -rf "$WORK/model"
    train_start=$SECONDS
    train model "${flags[@]}"
    evomoe-average "$WORK/model" --last 4 --output "$WORK/model/averaged.pt"
    echo "training: $((SECONDS - train_start)) s"
fi

rm -f "$WORK/scores.jsonl"
for i in "${!tests[@]}"; do
    subset=test$([ "$i" = 0 ] || echo "$i")
    translate model averaged.pt "$subset" "$src" "$tgt" "$data/${tests[$i]}.$src" --beam 4 --max-tokens 6000 \
        --max-len-a 2 --max-len-b 20
    tags=$data/${tests[$i]}.tags
    [ -e "$tags" ] && tags=(--tags "$tags") || tags=()
    python recipes/steps/score.py --name "${tests[$i]}" --source "$data/${tests[$i]}.$src" \
        --reference "$data/${tests[$i]}.$tgt" --hypothesis "$WORK/model/$subset.hyp" \
        --train-source "$data/train.$src" --train-target "$data/train.$tgt" \
        "${tags[@]}" --show 3 --json "$WORK/scores.jsonl"
done
python recipes/steps/plot_training.py --log "$WORK/model/train.log" --out "$WORK/evolution.png"
page model "$data/${tests[0]}.$tgt"
echo "job: $((SECONDS - start)) s without set-up; model: $WORK/model/averaged.pt"
