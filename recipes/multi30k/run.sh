#!/usr/bin/env bash
# English to German on Multi30k (29,000 image captions): dense, EvoMoE and other gates from one script.
#
#   bash recipes/multi30k/run.sh --model evomoe            downloads the data
#   bash recipes/multi30k/run.sh --model dense --data DIR  DIR/{train,valid,test2016,test2017}.{en,de}
#   models:  dense, evomoe, switch, gshard, base, hash, stable
#   options: --updates N (1000)  --seed N (1)  --out DIR (work/multi30k)  -- further fairseq-train flags
set -euo pipefail
cd "$(dirname "$0")/../.."

data= model=evomoe updates=1000 seed=1 WORK=$PWD/work/multi30k
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=$2 ;; --model) model=$2 ;; --updates) updates=$2 ;; --seed) seed=$2 ;;
        --out) mkdir -p "$2"; WORK=$(cd "$2" && pwd) ;;
        --) shift; break ;;
        *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; echo "unknown option: $1" >&2; exit 2 ;;
    esac
    shift 2
done
case $model in
    dense) flags=(--moe-freq 0) ;;
    evomoe) flags=(--moe-freq 2 --moe-expert-count 4) ;;
    switch | gshard | base | hash) flags=(--moe-freq 2 --moe-expert-count 4 --moe-gate "$model") ;;
    stable) flags=(--moe-freq 2 --moe-expert-count 4 --moe-gate stable --moe-gate-loss-wt 0.3) ;;
    *) echo "--model $model: choose dense, evomoe, switch, gshard, base, hash or stable" >&2; exit 2 ;;
esac

extras=plots . recipes/environment.sh
. recipes/translation.sh
mkdir -p "$WORK"
if [ -z "$data" ]; then
    data=$WORK/data
    python recipes/multi30k/download.py --out "$data"
fi
prepare en de 4000 "$data/train" "$data/valid" "$data/test2016" "$data/test2017"

name=$model-$updates-seed$seed
if [ ! -e "$WORK/$name/averaged.pt" ]; then
    rm -rf "${WORK:?}/$name"
    train "$name" \
        --task translation_evomoe --source-lang en --target-lang de \
        --arch transformer_evomoe --encoder-layers 3 --decoder-layers 3 \
        --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 "${flags[@]}" \
        --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 \
        --dropout 0.2 --optimizer adam --adam-betas '(0.9, 0.98)' \
        --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 600 \
        --max-tokens 4096 --max-update "$updates" --seed "$seed" \
        --save-interval-updates $((updates / 20 > 0 ? updates / 20 : 1)) --keep-interval-updates 4 \
        --no-epoch-checkpoints --log-interval 25 "$@"
    evomoe-average "$WORK/$name" --last 4 --output "$WORK/$name/averaged.pt"
fi
for i in 0 1; do
    set -- test2016 test2017
    test=${@:$((i + 1)):1} subset=test$([ "$i" = 0 ] || echo "$i")
    translate "$name" averaged.pt "$subset" en de --beam 5 --max-tokens 8000
    python recipes/score.py --name "$name $test" --source "$data/$test.en" --reference "$data/$test.de" \
        --hypothesis "$WORK/$name/$subset.hyp" --json "$WORK/scores.jsonl"
done
[ "$model" = dense ] ||
    python recipes/plot_training.py --log "$WORK/$name/train.log" --out "$WORK/$name/evolution.png"
