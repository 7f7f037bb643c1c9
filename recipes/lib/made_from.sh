# What a work folder was made from. Source this file after setting WORK, and remake to 1 if --remake was given.

# made_from PART [flags of made_from.py]: stop if the part of $WORK was made from something else
made_from() {
    local part=$1
    shift
    mkdir -p "$WORK"
    python "$ROOT/recipes/steps/made_from.py" --work "$WORK" --part "$part" ${remake:+--remake} "$@"
}
