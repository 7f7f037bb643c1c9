# Functions that the translation recipes share. Source this file after environment.sh and made_from.sh. All
# results are written to $WORK. A model is a folder $WORK/<name>. A step whose result exists is not repeated.

USER_DIR=$ROOT/fairseq_evomoe
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
CPU=$(python -c 'import torch; print("" if torch.cuda.is_available() else "--cpu")')

# run_step OPTIONS -- COMMAND...: run a command with a log and a line of progress; see steps/run_step.py
run_step() { python "$ROOT/recipes/steps/run_step.py" "$@"; }

# devices_flags: flags of fairseq-train for $devices GPUs, or processes on a CPU; none if it is empty
devices_flags() { [ -z "$devices" ] || echo "--distributed-world-size $devices"; }

# threads_of_a_worker: how many threads each of the training's processes may use
threads_of_a_worker() {
    local threads=$((OMP_NUM_THREADS / ${devices:-1}))
    echo $((threads > 0 ? threads : 1))
}

# longer flags|copy: with --resume, see steps/longer.py; $runs is the name of the runs, with {} for the updates
longer() {
    [ -z "$resume" ] || python "$ROOT/recipes/steps/longer.py" --work "$WORK" --runs "$runs" --updates "$updates" "$1"
}

# number_after FLAG ARGUMENTS...: the last value of a flag in a list of flags
number_after() {
    local flag=$1 found=0
    shift
    while [ $# -gt 1 ]; do
        [ "$1" != "$flag" ] || found=$2
        shift
    done
    echo "$found"
}

# pieces SRC TGT VOCAB TRAIN VALID TEST... [-- flags of pieces.py]: split plain text into $WORK/pieces
pieces() {
    local src=$1 tgt=$2 vocab=$3 train=$4 valid=$5 tests=()
    shift 5
    while [ $# -gt 0 ] && [ "$1" != -- ]; do tests+=("$1"); shift; done
    [ "${1-}" = -- ] && shift
    # the training set is written last
    [ -e "$WORK/pieces/train.$tgt" ] && return
    python "$ROOT/recipes/steps/pieces.py" --out "$WORK/pieces" --source-lang "$src" --target-lang "$tgt" \
        --vocab "$vocab" --train "$train" --valid "$valid" --test "${tests[@]}" "$@"
}

# preprocess SRC TGT N: binarise $WORK/pieces, which has N test sets, into $WORK/bin
preprocess() {
    local src=$1 tgt=$2 tests= i
    [ -e "$WORK/bin/preprocess.done" ] && return
    for i in $(seq 0 $(($3 - 1))); do tests=$tests,$WORK/pieces/test$i; done
    rm -rf "$WORK/bin"
    run_step --step preprocess --log "$WORK/preprocess.log" -- fairseq-preprocess --source-lang "$src" \
        --target-lang "$tgt" --joined-dictionary --workers "$(nproc)" --trainpref "$WORK/pieces/train" \
        --validpref "$WORK/pieces/valid" --testpref "${tests#,}" --destdir "$WORK/bin" || return
    touch "$WORK/bin/preprocess.done"
}

# flags of every training run, which --print also shows
TRAINING=(--share-all-embeddings --required-batch-size-multiple 1 --log-format json)

# train NAME [flags]: write $WORK/NAME/checkpoint_last.pt and $WORK/NAME/train.log
train() {
    local name=$1
    shift
    mkdir -p "$WORK/$name"
    OMP_NUM_THREADS=$(threads_of_a_worker) run_step --step train --log "$WORK/$name/train.log" --append --updates "$(number_after --max-update "$@")" -- \
        fairseq-train "$WORK/bin" --user-dir "$USER_DIR" $CPU --save-dir "$WORK/$name" \
        --num-workers 0 "${TRAINING[@]}" "$@"
}

# most_pieces FLAGS...: how many pieces of a line the model takes, given the flags of fairseq-train
most_pieces() {
    local most=1024
    while [ $# -gt 1 ]; do
        case $1 in
            --max-source-positions | --max-target-positions | --max-tokens) [ "$2" -ge "$most" ] || most=$2 ;;
        esac
        shift
    done
    # one position is that of the end of the sentence
    echo $((most - 1))
}

# translate NAME CHECKPOINT SUBSET SRC TGT TEXT [flags]: write $WORK/NAME/SUBSET.hyp in the order of TEXT
translate() {
    local name=$1 checkpoint=$2 subset=$3 src=$4 tgt=$5 text=$6
    shift 6
    local out=$WORK/$name/$subset
    # a multiple of 1 keeps every sentence; with the default of 8, fairseq drops the last n mod 8
    run_step --step "translate $subset" --log "$out.err" --stdout "$out.gen" --sentences "$(wc -l <"$text")" -- \
        fairseq-generate "$WORK/bin" --user-dir "$USER_DIR" $CPU --source-lang "$src" --target-lang "$tgt" \
        --path "$WORK/$name/$checkpoint" --gen-subset "$subset" \
        --required-batch-size-multiple 1 --num-workers 0 "$@" || return
    python "$ROOT/recipes/steps/hypotheses.py" --generated "$out.gen" --spm "$WORK/pieces/spm.model" \
        --lines "$text" --out "$out.hyp"
}

# page NAME REFERENCE: write $WORK/NAME/report.html, which shows how the training of $WORK/NAME went
page() {
    local name=$1 reference=$2
    run_step --step report --log "$WORK/$name/report.log" -- evomoe-report page --title "$name" \
        --log "$name=$WORK/$name/train.log" --checkpoint "$WORK/$name/averaged.pt" --data "$WORK/bin" \
        --reference "$reference" --hypothesis "$name=$WORK/$name/test.hyp" --output "$WORK/$name/report.html" || return
    echo "report: $WORK/$name/report.html"
}
