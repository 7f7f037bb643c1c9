// Compiles EVOMOE_BODY, a header, once for each instruction set, in a namespace of its name, after
// cpu_vectors.h. DISPATCH(isa, call) makes the call in the namespace of `isa`, which is at most best_isa().

#define EVOMOE_ISA portable
#define EVOMOE_LANES 4
#include "cpu_vectors.h"
#include EVOMOE_BODY
#undef EVOMOE_ISA
#undef EVOMOE_LANES

#ifdef EVOMOE_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define EVOMOE_ISA avx2
#define EVOMOE_LANES 8
#include "cpu_vectors.h"
#include EVOMOE_BODY
#undef EVOMOE_ISA
#undef EVOMOE_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define EVOMOE_ISA avx512
#define EVOMOE_LANES 16
#include "cpu_vectors.h"
#include EVOMOE_BODY
#undef EVOMOE_ISA
#undef EVOMOE_LANES
#pragma GCC pop_options

#define DISPATCH(isa, call)                      \
    switch (isa) {                               \
        case AVX512: avx512::call; break;        \
        case AVX2: avx2::call; break;            \
        default: portable::call;                 \
    }
#else
#define DISPATCH(isa, call) portable::call
#endif
