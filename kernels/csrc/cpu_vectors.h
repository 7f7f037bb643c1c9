// Vectors of floats of one instruction set. cpu_isas.h sets EVOMOE_ISA (a namespace), EVOMOE_LANES and the
// target. There is no include guard, because the file is included several times.

namespace EVOMOE_ISA {

// Number of floats in a register of this instruction set.
constexpr int V = EVOMOE_LANES;
typedef float fv __attribute__((vector_size(4 * V)));
typedef int32_t iv __attribute__((vector_size(4 * V)));
typedef float loose __attribute__((vector_size(4 * V), aligned(4), may_alias));

static inline fv load(const float* p) { return *(const loose*)p; }
static inline void store(float* p, fv v) { *(loose*)p = v; }
static inline fv load(const int8_t* p) {
    // intrinsics, because the compiler converts bytes with several times as many instructions
#if EVOMOE_LANES == 16
    return (fv)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif EVOMOE_LANES == 8
    return (fv)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t bytes __attribute__((vector_size(V), aligned(1), may_alias));
    return __builtin_convertvector(__builtin_convertvector(*(const bytes*)p, iv), fv);
#endif
}
// Sums of two products each, of 2 V bytes and 2 V rounded inputs.
static inline iv products(const int8_t* w, const int16_t* x) {
#if EVOMOE_LANES == 16
    return (iv)_mm512_madd_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)),
                                 _mm512_loadu_si512(x));
#elif EVOMOE_LANES == 8
    return (iv)_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)),
                                 _mm256_loadu_si256((const __m256i*)x));
#else
    iv sums;
    for (int i = 0; i < V; i++) sums[i] = w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1];
    return sums;
#endif
}
static inline fv load(const bfloat* p) {
    typedef uint16_t halves __attribute__((vector_size(2 * V), aligned(2), may_alias));
    typedef uint32_t words __attribute__((vector_size(4 * V)));
    return (fv)(__builtin_convertvector(*(const halves*)p, words) << 16);
}
static inline void store(bfloat* p, fv v) {
    typedef uint16_t halves __attribute__((vector_size(2 * V), aligned(2), may_alias));
    typedef uint32_t words __attribute__((vector_size(4 * V)));
    // to the nearest, and to the even one of two as near; what is not a number stays none
    const words u = (words)v, odd = u >> 16 & 1, none = (words)(v != v);
    const words rounded = (u + 0x7fff + odd) >> 16;
    *(halves*)p = __builtin_convertvector((rounded & ~none) | (0x7fc0 & none), halves);
}
static inline float widen(float x) { return x; }
static inline float widen(int8_t x) { return x; }
static inline float widen(bfloat x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// e^x for x <= 0, 0 for x below -87, and not a number where x is none. After range reduction to |r| <= ln(2)/2, the Taylor series is
// evaluated up to r^7 (1e-8).
static inline fv exp_negative(fv x) {
    const iv tiny = x < -87.0f;
    x = (fv)(((iv)x & ~tiny) | ((iv)(fv{} - 87.0f) & tiny));
    const iv n = __builtin_convertvector(x * 1.44269504088896f - 0.5f, iv);
    const fv k = __builtin_convertvector(n, fv);
    const fv r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    fv y = fv{} + 1.98412698e-4f;
    y = y * r + 1.38888889e-3f;
    y = y * r + 8.33333333e-3f;
    y = y * r + 4.16666667e-2f;
    y = y * r + 1.66666667e-1f;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    y = (fv)((iv)y + (n << 23));
    return (fv)((iv)y & ~tiny);
}

// Sum of the lanes; in each step the upper half is added to the lower half.
static inline float total(fv v) {
    typedef float f8 __attribute__((vector_size(32)));
    typedef float f4 __attribute__((vector_size(16)));
    f8 a;
    f4 b;
    if constexpr (V == 16) {
        f8 high;
        std::memcpy(&a, &v, 32);
        std::memcpy(&high, (const char*)&v + 32, 32);
        a += high;
    } else if constexpr (V == 8) {
        std::memcpy(&a, &v, 32);
    }
    if constexpr (V == 4) {
        std::memcpy(&b, &v, 16);
    } else {
        f4 high;
        std::memcpy(&b, &a, 16);
        std::memcpy(&high, (const char*)&a + 16, 16);
        b += high;
    }
    return (b[0] + b[2]) + (b[1] + b[3]);
}

// Sums of the lanes of V vectors, in their order. In each step, neighbouring lanes of two vectors are
// added and become the halves of one.
static inline fv totals(fv (&v)[V]) {
    iv even, odd;
    for (int i = 0; i < V; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    for (int n = V; n > 1; n /= 2)
        for (int i = 0; i < n / 2; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) +
                   __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    return v[0];
}

}  // namespace EVOMOE_ISA
