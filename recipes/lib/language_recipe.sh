# Runs a language-model recipe step by step. recipes/<corpus>/run.sh sources this file after setting RECIPE
# to its folder, setting the defaults of vocab and updates, and defining the function fetch. fetch downloads
# missing files and sets sets=(train valid test), each a file or "archive!member".

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$RECIPE/run.sh" >&2
    cat >&2 <<'TEXT'
options (defaults in parentheses):
  --task T        lm (causal, GPT) or mlm (masked, RoBERTa) (lm)
  --model M       dense, evomoe, switch, gshard, base, hash, stable, memoryformer (evomoe)
  --size S        tiny, small, base (GPT small, RoBERTa base), medium (as in the papers: GPT medium, RoBERTa large)
  --data DIR      folder with {train,valid,test}.txt, or with the downloaded files under their published names
  --classes DIR   with --task mlm, fine-tune on DIR/{train,dev}.tsv, whose columns are named by
                  --text "sentence1 sentence2" (sentence) and --label NAME (label), as in GLUE
  --vocab N, --updates N, --seed N (1), --out DIR (work/<corpus>)
  --devices N     train on N GPUs, or in N processes on a CPU; an update then has N times as many tokens
                  (all GPUs; one process on a CPU)
  --resume        go on from the training of this model with the most updates below --updates
  --remake        delete results in --out that were made from other data or with other options
  --print         print the training command and stop, for use with torchrun or Slurm
  -- FLAGS        pass further flags to fairseq-train
TEXT
}

. recipes/lib/options.sh
data= task=lm model=evomoe size=base seed=1 classes= text=sentence label=label print= remake= out= devices= resume=
parse_options "task model size data classes text label vocab updates seed devices out" "resume print remake" "$@"
check_numbers devices vocab updates || exit 2
data=$(folder_from_caller --data "$data") || exit 2
classes=$(folder_from_caller --classes "$classes") || exit 2
WORK=$(from_caller "$out")
WORK=${WORK:-$PWD/work/$(basename "$RECIPE")}
case $task in lm | mlm) ;; *) echo "--task $task: choose lm or mlm" >&2; exit 2 ;; esac
[ -z "$classes" ] || [ "$task" = mlm ] || { echo "--classes fine-tunes --task mlm only; add --task mlm" >&2; exit 2; }
. recipes/lib/families.sh
experts=16
case $size in
    tiny) experts=4 shape="64 128 2 2" rate="3e-3 50 2048" length=64 ;;
    small) experts=8 shape="128 512 2 4" rate="3e-3 100 2048" length=128 ;;
    base) shape="768 3072 12 12" rate="5e-4 4000 2048" length=512 ;;
    medium) shape="1024 4096 24 16" rate="3e-4 4000 2048" length=512 ;;
    *) echo "--size $size: choose tiny, small, base or medium" >&2; exit 2 ;;
esac
family=$(family_flags "$model") || exit 2
read -r width hidden layers heads <<<"$shape"
read -r lr warmup tokens <<<"$rate"

extras=${extras:-plots}
. recipes/lib/environment.sh
. recipes/lib/translation.sh
name=$task-$model-$size-$updates-seed$seed
runs=$task-$model-$size-{}-seed$seed
before=$(longer flags)
if [ "$task" = lm ]; then
    arch=(--arch transformer_lm_evomoe --decoder-embed-dim "$width" --decoder-ffn-embed-dim "$hidden"
        --decoder-layers "$layers" --decoder-attention-heads "$heads" --share-decoder-input-output-embed)
    flags=(--task language_modeling_evomoe "${arch[@]}" --criterion moe_cross_entropy)
else
    arch=(--arch roberta_evomoe --encoder-embed-dim "$width" --encoder-ffn-embed-dim "$hidden"
        --encoder-layers "$layers" --encoder-attention-heads "$heads" --max-positions "$length")
    flags=(--task masked_lm_evomoe "${arch[@]}" --criterion moe_masked_lm)
fi
every=$((updates / 10 > 0 ? updates / 10 : 1))
flags+=(
    --tokens-per-sample "$length" --sample-break-mode none $family --optimizer adam --adam-betas '(0.9, 0.98)'
    --weight-decay 0.01 --lr "$lr" --lr-scheduler inverse_sqrt --warmup-updates "$warmup"
    --max-tokens "$tokens" --max-update "$updates" --seed "$seed" --save-interval-updates "$every"
    --keep-interval-updates 1 --no-epoch-checkpoints --required-batch-size-multiple 1
    --log-format json --log-interval $((every < 25 ? every : 25)) $(devices_flags) $before "${rest[@]}"
)
if [ -n "$print" ]; then
    printf '%q ' fairseq-train "$WORK/bin" --user-dir "$USER_DIR" --save-dir "$WORK/$name" "${flags[@]}"
    echo
    exit
fi

# what the results in $WORK were made from
. recipes/lib/made_from.sh
files=()
if [ -n "$data" ]; then
    found=("$data"/{train,valid,test}.txt)
    [ -e "${found[0]}" ] || mapfile -t found < <(find "$data" -type f | sort)
    for file in "${found[@]}"; do files+=("$(basename "$file")=$file"); done
fi
models=()
for log in "$WORK"/*/train.log; do models+=("$(dirname "$log")"); done
made_from data --files "${files[@]}" --values data="$([ -n "$data" ] && echo files || echo download)" vocab="$vocab" \
    --versions sentencepiece fairseq-evomoe --results "$WORK"/{text,bin} "$WORK"/classes-* "${models[@]}"
made_from "model $name" --results "$WORK/$name" --versions torch fairseq-fixed ve-fairseq fairseq-evomoe --flags "${flags[@]}"
if [ -n "$classes" ]; then
    bin=$WORK/classes-$(basename "$classes")
    files=()
    for split in train dev valid; do
        [ ! -e "$classes/$split.tsv" ] || files+=("$split.tsv=$classes/$split.tsv")
    done
    made_from "classes $(basename "$classes")" --files "${files[@]}" --values text="$text" label="$label" \
        --results "$bin" "$WORK"/*/"$(basename "$classes")"
fi

mkdir -p "$WORK/text"
if [ ! -e "$WORK/text/counts.json" ]; then
    if [ -n "$data" ] && [ -e "$data/train.txt" ]; then
        sets=("$data/train.txt" "$data/valid.txt" "$data/test.txt")
    else
        fetch
    fi
    python recipes/steps/language_text.py --out "$WORK/text" --vocab "$vocab" \
        --train "${sets[0]}" --valid "${sets[1]}" --test "${sets[2]}"
fi
if [ ! -e "$WORK/bin/preprocess.done" ]; then
    rm -rf "$WORK/bin"
    run_step --step preprocess --log "$WORK/preprocess.log" -- fairseq-preprocess --only-source \
        --workers "$(nproc)" --trainpref "$WORK/text/train" --validpref "$WORK/text/valid" \
        --testpref "$WORK/text/test" --destdir "$WORK/bin"
    touch "$WORK/bin/preprocess.done"
fi

if [ ! -e "$WORK/$name/done" ]; then
    echo "train $name"
    mkdir -p "$WORK/$name"
    longer copy
    OMP_NUM_THREADS=$(threads_of_a_worker) run_step --step train --log "$WORK/$name/train.log" --append --updates "$updates" -- \
        fairseq-train "$WORK/bin" --user-dir "$USER_DIR" $CPU --save-dir "$WORK/$name" --num-workers 0 "${flags[@]}"
    touch "$WORK/$name/done"
fi

log=$WORK/$name/test.log
score=(--path "$WORK/$name/checkpoint_best.pt" --user-dir "$USER_DIR" $CPU --num-workers 0 --max-tokens "$tokens"
    --required-batch-size-multiple 1)
if [ "$task" = lm ]; then
    run_step --step test --log "$log" -- fairseq-eval-lm "$WORK/bin" "${score[@]}" --gen-subset test \
        --tokens-per-sample "$length" --sample-break-mode none
else
    run_step --step test --log "$log" -- fairseq-validate "$WORK/bin" "${score[@]}" --task masked_lm_evomoe \
        --valid-subset test --seed "$seed" --tokens-per-sample "$length" --sample-break-mode none --log-format json
fi
python recipes/steps/perplexity.py --name "$name" --log "$log" --counts "$WORK/text/counts.json" --json "$WORK/scores.jsonl"

if [ -n "$classes" ]; then
    [ -e "$bin/classes.json" ] || python recipes/steps/classes.py --data "$classes" --spm "$WORK/text/spm.model" \
        --dict "$WORK/bin/dict.txt" --text $text --label "$label" --out "$bin"
    number=$(python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$bin/classes.json")
    tuned=$WORK/$name/$(basename "$classes")
    mkdir -p "$tuned"
    run_step --step fine-tune --log "$tuned/train.log" -- \
        fairseq-train "$bin" --user-dir "$USER_DIR" $CPU --num-workers 0 --save-dir "$tuned" --task sentence_prediction \
        --num-classes "$number" --shorten-method truncate --init-token 0 --separator-token 2 --restore-file "$WORK/$name/checkpoint_best.pt" \
        --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler "${arch[@]}" $family \
        --criterion moe_sentence_prediction --optimizer adam --lr 1e-4 --lr-scheduler polynomial_decay \
        --warmup-updates 30 --total-num-update 1000000 --batch-size 16 --max-epoch 10 --seed "$seed" \
        --required-batch-size-multiple 1 --no-epoch-checkpoints --best-checkpoint-metric accuracy \
        --maximize-best-checkpoint-metric --log-format json
    python recipes/steps/accuracy.py --name "$name $(basename "$classes")" --log "$tuned/train.log" \
        --json "$WORK/scores.jsonl"
fi
