// What `ddsweep/core/native.py` compiles: layers of a 5x5 convolution, 2x2 max-pool, bias and ReLU of K
// networks, without gradients.
//
// LANES images are one vector, and all arithmetic is on vectors. A block of that many images goes through
// all layers of one network before the next one's turn, so that what lies between two layers stays in the
// cache. What is pooled is never written: the four sums of a window, of two outputs, are kept in registers.

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int SIZE = 5;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int Mask __attribute__((vector_size(4 * LANES)));

// Weights [K, outputs, channels, SIZE, SIZE] and biases [K, outputs], for inputs of high x wide pixels.
struct Layer {
    const float *weight, *bias;
    long outputs, channels, high, wide;
};

static inline long pooled(long side) { return (side - SIZE + 1) / 2; }

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// One pooled pixel of OUTPUTS outputs, which are `between` vectors apart in y. x is where its window begins.
template <int OUTPUTS>
static inline __attribute__((always_inline)) void pixel(const Vector *x, const float *weight, const float *bias,
                                                        Vector *y, long between, const Layer &layer) {
    Vector sum[OUTPUTS][4];
#pragma GCC unroll 2
    for (int o = 0; o < OUTPUTS; o++)
#pragma GCC unroll 4
        for (int place = 0; place < 4; place++) sum[o][place] = Vector{};
    for (long c = 0; c < layer.channels; c++)
        for (int i = 0; i < SIZE; i++) {
            const Vector *upper = x + (c * layer.high + i) * layer.wide, *lower = upper + layer.wide;
            const float *row = weight + (c * SIZE + i) * SIZE;
#pragma GCC unroll 5
            for (int j = 0; j < SIZE; j++)
#pragma GCC unroll 2
                for (int o = 0; o < OUTPUTS; o++) {
                    const Vector w = Vector{} + row[o * layer.channels * SIZE * SIZE + j];
                    sum[o][0] += w * upper[j];
                    sum[o][1] += w * upper[j + 1];
                    sum[o][2] += w * lower[j];
                    sum[o][3] += w * lower[j + 1];
                }
        }
#pragma GCC unroll 2
    for (int o = 0; o < OUTPUTS; o++) {
        const Vector *s = sum[o];
        // As in torch the maximum is NaN where one of them is.
        const Mask nan = (s[0] != s[0]) | (s[1] != s[1]) | (s[2] != s[2]) | (s[3] != s[3]);
        Vector most = larger(larger(s[0], s[1]), larger(s[2], s[3])) + bias[o];
        most = most < 0 ? Vector{} : most;
        y[o * between] = (Vector)((Mask)most | nan);
    }
}

// Outputs from `first` on, OUTPUTS at a time, of one row of pooled pixels; those in y are `step` apart.
template <int OUTPUTS>
static long row(const Vector *x, const float *weight, const float *bias, Vector *y, long step, long i, long first,
                const Layer &layer) {
    const long high = pooled(layer.high), wide = pooled(layer.wide);
    long o = first;
    for (; o + OUTPUTS <= layer.outputs; o += OUTPUTS)
        for (long j = 0; j < wide; j++)
            pixel<OUTPUTS>(x + 2 * (i * layer.wide + j), weight + o * layer.channels * SIZE * SIZE, bias + o,
                           y + ((o * high + i) * wide + j) * step, high * wide * step, layer);
    return o;
}

extern "C" long lanes() { return LANES; }

// images [blocks, channels, high, wide, LANES] -> y [K, outputs, high', wide', blocks * LANES] of the last of
// `count` layers, for blocks from `begin` to before `end`. `between` has room for two times `room` vectors, the
// outputs of a layer for one block.
extern "C" void forward(const Vector *images, long blocks, long begin, long end, long networks, long count,
                        const Layer *layers, Vector *between, long room, Vector *y) {
    const Layer &first = layers[0], &last = layers[count - 1];
    const long size = last.outputs * pooled(last.high) * pooled(last.wide);
    for (long block = begin; block < end; block++)
        for (long k = 0; k < networks; k++) {
            const Vector *x = images + block * first.channels * first.high * first.wide;
            for (long n = 0; n < count; n++) {
                const Layer &layer = layers[n];
                const float *weight = layer.weight + k * layer.outputs * layer.channels * SIZE * SIZE;
                const float *bias = layer.bias + k * layer.outputs;
                const bool done = n == count - 1;
                Vector *to = done ? y + k * size * blocks + block : between + n % 2 * room;
                const long step = done ? blocks : 1;
                for (long i = 0; i < pooled(layer.high); i++) {
                    const long even = row<2>(x, weight, bias, to, step, i, 0, layer);
                    row<1>(x, weight, bias, to, step, i, even, layer);
                }
                x = to;
            }
        }
}
