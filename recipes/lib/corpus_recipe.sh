# Runs the recipe of a corpus step by step. recipes/<corpus>/run.sh sources this file after setting RECIPE
# to its folder, and size, updates, average, experts and search to its defaults.

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$RECIPE/run.sh" >&2
    cat >&2 <<'TEXT'
options (defaults in parentheses):
  --model M       dense, evomoe, switch, gshard, base, hash, stable, memoryformer (evomoe)
  --size S        tiny, small, iwslt, base, big
  --data DIR      take files from DIR instead of the network: the archives under their published names,
                  or plain {train,valid,<test set>}.<language>
  --steps A,B     run only these, out of the steps download extract clean pieces preprocess train average generate score
  --tests A,B     test sets <name>.<language> in --data that replace those of the corpus
  --updates N, --vocab N (pieces), --seed N (1), --out DIR (work/<corpus>)
  --devices N     train on N GPUs, or in N processes on a CPU; an update then has N times as many tokens
                  (all GPUs; one process on a CPU)
  --resume        go on from the training of this model with the most updates below --updates
  --any-lines     do not check the numbers of lines
  --drop-broken-lines  leave out training pairs that are not UTF-8 text, and count them
  --long-lines L  stop at lines of valid and test sets that are longer than the model's positions, or cut them (stop)
  --remake        delete results in --out that were made from other data or with other options
  --baseline NAME compare with the model in <out>/NAME by a paired bootstrap
  --comet         also compute COMET (unbabel-comet must be installed; its model is downloaded)
  --print         print the training command and stop, for use with torchrun or Slurm
  -- FLAGS        pass further flags to fairseq-train
TEXT
}

. recipes/lib/families.sh

# flags for the architecture and optimisation of each size
size_flags() {
    case $1 in
        tiny) echo --arch transformer_evomoe --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 64 \
            --encoder-ffn-embed-dim 128 --dropout 0.1 --lr 5e-3 --warmup-updates 100 --max-tokens 2048 ;;
        small) echo --arch transformer_evomoe --encoder-layers 3 --decoder-layers 3 --encoder-embed-dim 128 \
            --encoder-ffn-embed-dim 512 --dropout 0.2 --lr 5e-3 --warmup-updates 600 --max-tokens 4096 ;;
        base) echo --arch transformer_evomoe_wmt_en_de --dropout 0.1 --lr 7e-4 --warmup-updates 4000 \
            --warmup-init-lr 1e-7 --max-tokens 4096 ;;
        big) echo --arch transformer_evomoe_wmt_en_de_big --dropout 0.3 --lr 5e-4 --warmup-updates 4000 \
            --warmup-init-lr 1e-7 --max-tokens 3584 ;;
        iwslt) echo --arch transformer_evomoe_iwslt_de_en --dropout 0.3 --weight-decay 1e-4 --lr 5e-4 \
            --warmup-updates 4000 --max-tokens 4096 ;;
        *) echo "--size $1: choose tiny, small, iwslt, base or big" >&2; return 2 ;;
    esac
}

. recipes/lib/options.sh
data= model=evomoe seed=1 tests= vocab= devices= resume= steps= any_lines= baseline= comet= print= drop_broken_lines= long_lines=stop remake= out=
parse_options "model size data tests vocab steps updates seed devices out baseline long-lines" "resume any-lines drop-broken-lines remake comet print" "$@"
data=$(folder_from_caller --data "$data") || exit 2
WORK=$(from_caller "$out")
WORK=${WORK:-$PWD/work/$(basename "$RECIPE")}
[ -z "$tests" ] || [ -n "$data" ] || { echo "--tests $tests: these test sets are read from --data; give the folder" >&2; exit 2; }
check_numbers devices vocab updates || exit 2
other_tests=${tests:+--tests $tests} other_vocab=${vocab:+--vocab $vocab}
only=${steps:+,$steps,}
any_lines=${any_lines:+--any-lines} broken=${drop_broken_lines:+--drop-broken-lines} comet=${comet:+--comet}
family=$(family_flags "$model") || exit 2
shape=$(size_flags "$size") || exit 2
for step in $(echo "$only" | tr , ' '); do
    case " download extract clean pieces preprocess train average generate score " in
        *" $step "*) ;;
        *) usage; echo "--steps: there is no step $step; choose from the list above" >&2; exit 2 ;;
    esac
done

extras=plots,langid . recipes/lib/environment.sh
. recipes/lib/made_from.sh
. recipes/lib/translation.sh
# sets src, tgt, vocab, hold_out, tests, inputs, clean_flags and piece_flags
eval "$(python recipes/steps/corpus.py "$RECIPE/corpus.toml" $other_tests $other_vocab)"
runs=$model-$size-{}-seed$seed
before=$(longer flags)
name=$model-$size-$updates-seed$seed
every=$((updates / 20 > 0 ? updates / 20 : 1))
flags=(
    --task translation_evomoe --source-lang "$src" --target-lang "$tgt" $shape $family
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr-scheduler inverse_sqrt
    --max-update "$updates" --seed "$seed" --save-interval-updates "$every" --keep-interval-updates "$average"
    --no-epoch-checkpoints --log-interval $((every < 25 ? every : 25)) $(devices_flags)
    $before "${rest[@]}"
)
if [ -n "$print" ]; then
    printf '%q ' fairseq-train "$WORK/bin" --user-dir "$USER_DIR" --save-dir "$WORK/$name" \
        "${TRAINING[@]}" "${flags[@]}"
    echo
    exit
fi

# what the results in $WORK were made from; the data matters to the steps that read it
pieces=$(most_pieces "${flags[@]}")
if [ -z "$only" ] || [ -n "$data" ] || [[ $only =~ ,(download|extract|clean|pieces|preprocess), ]]; then
    files=("corpus.toml=$RECIPE/corpus.toml")
    for file in "${inputs[@]}"; do
        for form in "$data/$file"{,.gz,.xz,.bz2,.zst}; do
            [ -z "$data" ] || [ ! -e "$form" ] || files+=("$file=$form")
        done
    done
    models=()
    for log in "$WORK"/*/train.log; do models+=("$(dirname "$log")"); done
    made_from data --files "${files[@]}" --values data="$([ -n "$data" ] && echo files || echo download)" \
        ${other_vocab:+vocab="$vocab"} ${other_tests:+tests="${tests[*]}"} drop_broken_lines="$broken" most_pieces="$pieces" long_lines="$long_lines" \
        --versions sentencepiece sacrebleu fairseq-evomoe --results "$WORK"/{text,pieces,bin} "${models[@]}"
fi
made_from "model $name" --results "$WORK/$name" --versions torch fairseq-fixed ve-fairseq fairseq-evomoe --flags "${flags[@]}"
made_from "translations $name" --results "$WORK/$name"/{averaged.pt,test*.hyp} \
    --flags --average "$average" $search

# step NAME RESULT COMMAND...: run COMMAND unless RESULT exists or --steps leaves NAME out
step() {
    local which=$1 result=$2
    shift 2
    [ -z "$only" ] || [[ $only = *,$which,* ]] || return 0
    [ -n "$result" ] && [ -e "$result" ] && return 0
    echo "$which"
    "$@"
}

text=$WORK/text
mirror=()
[ -n "$data" ] && mirror=(--mirror "$data")
step download "$text/${tests[-1]}.$tgt" python recipes/steps/download.py "$RECIPE/corpus.toml" --out "$WORK/archives" "${mirror[@]}"
step extract "$text/${tests[-1]}.$tgt" python recipes/steps/extract.py "$RECIPE/corpus.toml" \
    --archives "$WORK/archives" --out "$text" "${mirror[@]}" $other_tests $any_lines $broken
held_out=("${tests[@]/#/$text/}")
[ "$hold_out" = 0 ] && held_out+=("$text/valid") || clean_flags+=(--hold-out-every "$hold_out" --valid "$text/valid")
step clean "$text/clean.$tgt" python recipes/steps/clean.py --source-lang "$src" --target-lang "$tgt" \
    --train "$text/train" --held-out "${held_out[@]}" --out "$text/clean" "${clean_flags[@]}"
step pieces "" pieces "$src" "$tgt" "$vocab" "$text/clean" "$text/valid" "${tests[@]/#/$text/}" -- "${piece_flags[@]}" \
    --max-pieces "$pieces" --long-lines "$long_lines"
step preprocess "" preprocess "$src" "$tgt" "${#tests[@]}"
train_model() { longer copy && train "$@"; }
step train "$WORK/$name/averaged.pt" train_model "$name" "${flags[@]}"
step average "$WORK/$name/averaged.pt" evomoe-average "$WORK/$name" --last "$average" --output "$WORK/$name/averaged.pt"
for i in "${!tests[@]}"; do
    subset=test$([ "$i" = 0 ] || echo "$i")
    step generate "$WORK/$name/$subset.hyp" translate "$name" averaged.pt "$subset" "$src" "$tgt" \
        "$text/${tests[$i]}.$src" --max-len-a 2 --max-len-b 20 $search
    against=()
    [ -n "$baseline" ] && against=(--baseline "$WORK/$baseline/$subset.hyp")
    step score "" python recipes/steps/score.py --name "$name ${tests[$i]}" --source "$text/${tests[$i]}.$src" \
        --reference "$text/${tests[$i]}.$tgt" --hypothesis "$WORK/$name/$subset.hyp" \
        --json "$WORK/scores.jsonl" "${against[@]}" $comet
done
if [ "$model" != dense ] && [ "$model" != memoryformer ]; then
    step score "" python recipes/steps/plot_training.py --log "$WORK/$name/train.log" --out "$WORK/$name/evolution.png"
fi
step score "" page "$name" "$text/${tests[0]}.$tgt"
