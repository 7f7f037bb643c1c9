// What cpu_isas.h compiles for each instruction set.
#include "lookup_cpu.h"
#include "lookup_cpu_backward.h"
