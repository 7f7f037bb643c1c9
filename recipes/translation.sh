# What the translation recipes share; source it after environment.sh. Everything lands in $WORK.
# A model is a folder $WORK/<name>; a step whose result exists is not repeated.

USER_DIR=$ROOT/fairseq_evomoe
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
CPU=$(python -c 'import torch; print("" if torch.cuda.is_available() else "--cpu")')

# prepare SRC TGT VOCAB TRAIN VALID TEST...: plain text $TRAIN.$SRC ... -> $WORK/bin
prepare() {
    local src=$1 tgt=$2 vocab=$3 train=$4 valid=$5 tests=
    shift 5
    [ -e "$WORK/bin/dict.$tgt.txt" ] && return
    python "$ROOT/recipes/prepare_text.py" --out "$WORK/pieces" --source-lang "$src" --target-lang "$tgt" \
        --vocab "$vocab" --train "$train" --valid "$valid" --test "$@"
    for i in $(seq 0 $(($# - 1))); do tests=$tests,$WORK/pieces/test$i; done
    fairseq-preprocess --source-lang "$src" --target-lang "$tgt" --joined-dictionary --workers "$(nproc)" \
        --trainpref "$WORK/pieces/train" --validpref "$WORK/pieces/valid" --testpref "${tests#,}" \
        --destdir "$WORK/bin" >"$WORK/preprocess.log" 2>&1
}

# train NAME [flags]: -> $WORK/NAME/checkpoint_last.pt and $WORK/NAME/train.log
train() {
    local name=$1
    shift
    mkdir -p "$WORK/$name"
    fairseq-train "$WORK/bin" --user-dir "$USER_DIR" $CPU --save-dir "$WORK/$name" \
        --share-all-embeddings --required-batch-size-multiple 1 --num-workers 0 \
        --log-format json "$@" >"$WORK/$name/train.log" 2>&1 ||
        { tail -n 20 "$WORK/$name/train.log" >&2; return 1; }
}

# translate NAME CHECKPOINT SUBSET SRC TGT [flags]: -> $WORK/NAME/SUBSET.hyp, in the order of the test set
translate() {
    local name=$1 checkpoint=$2 subset=$3 src=$4 tgt=$5
    shift 5
    local out=$WORK/$name/$subset
    # the multiple of 1 keeps every sentence: fairseq's default of 8 drops the last n mod 8
    fairseq-generate "$WORK/bin" --user-dir "$USER_DIR" $CPU --source-lang "$src" --target-lang "$tgt" \
        --path "$WORK/$name/$checkpoint" --gen-subset "$subset" --remove-bpe sentencepiece \
        --required-batch-size-multiple 1 --num-workers 0 "$@" >"$out.gen" 2>"$out.err" ||
        { tail -n 20 "$out.err" >&2; return 1; }
    grep '^H-' "$out.gen" | cut -c3- | sort -n | cut -f3 >"$out.hyp"
}
