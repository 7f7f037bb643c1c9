# The model families that every recipe knows. Source this file. $experts is the number of experts of an MoE model.

# prints the flags of a model family, which are the same for every size
family_flags() {
    case $1 in
        dense) echo --moe-freq 0 ;;
        evomoe) echo --moe-freq 2 --moe-expert-count "$experts" ;;
        switch | gshard | base | hash) echo --moe-freq 2 --moe-expert-count "$experts" --moe-gate "$1" ;;
        stable) echo --moe-freq 2 --moe-expert-count "$experts" --moe-gate stable --moe-gate-loss-wt 0.3 ;;
        # the form with the lowest loss so far; see docs/look_up_layers.md
        memoryformer) echo --moe-freq 0 --memory-ffn --memory-attention --memory-bits 4 --memory-score l1 \
            --memory-linear --memory-straight-through ;;
        *) echo "--model $1: choose dense, evomoe, switch, gshard, base, hash, stable or memoryformer" >&2; return 2 ;;
    esac
}
