# Reads the options of a recipe. Source this file after defining usage and setting CALLER to the folder from
# which the recipe was called.

# parse_options NAMES SWITCHES ARGUMENTS...: sets the variable of each option that is given, with _ for -.
# NAMES take a value and SWITCHES are set to 1. What follows -- is left in the array rest.
parse_options() {
    local names=" $1 " switches=" $2 " name
    shift 2
    # how to go on after an interruption, for run_step.py
    printf -v EVOMOE_RECIPE '%q ' bash "$0" "$@"
    export EVOMOE_RECIPE
    rest=()
    while [ $# -gt 0 ]; do
        name=${1#--}
        if [ "$1" = -- ]; then
            shift
            rest=("$@")
            return
        elif [ "$name" != "$1" ] && [[ $names = *" $name "* ]]; then
            [ $# -ge 2 ] || { usage; echo "$1 needs a value" >&2; exit 2; }
            printf -v "${name//-/_}" %s "$2"
            shift 2
        elif [ "$name" != "$1" ] && [[ $switches = *" $name "* ]]; then
            printf -v "${name//-/_}" 1
            shift
        else
            usage
            echo "unknown option: $1" >&2
            exit 2
        fi
    done
}

# from_caller PATH: the absolute form of a path that the caller gave
from_caller() {
    case $1 in
        /* | "") echo "$1" ;;
        *) echo "$CALLER/$1" ;;
    esac
}

# folder_from_caller OPTION PATH: the same for a folder that must exist
folder_from_caller() {
    local path
    path=$(from_caller "$2")
    [ -z "$path" ] || [ -d "$path" ] || { echo "$1 $2: there is no folder $path" >&2; exit 2; }
    echo "$path"
}

# check_numbers NAMES...: each of the variables is empty or a whole number above 0
check_numbers() {
    local name
    for name in "$@"; do
        [[ ${!name:-1} =~ ^0*[1-9][0-9]*$ ]] || { echo "--$name ${!name}: give a whole number above 0" >&2; return 2; }
    done
}
