// The C interface of genarm-kernels: one step of reward-guided sampling for any engine.
//
// Each of B rows draws a token from softmax(z / temperature), z = base_weight * base + sum_i weight_i * arm_i, after
// top-k, top-p and min-p. What every field means, and what a row with NaN gets, is the contract that the docstring of
// Python's `genarm_kernels.guided_step` states; here stand the layouts.
//
// Thread-safe: no call leaves state behind but in the objects handed to it. Nothing is allocated when a workspace is
// given. A parameter of the rows is a pointer and a stride in elements: `data[row * stride]`; stride 0 is one value for
// every row. Strides may be negative. Outputs are contiguous. Work on a CPU is done in the default floating-point mode;
// threads have their own back afterwards.
#ifndef GENARM_KERNELS_H_
#define GENARM_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(GENARM_BUILDING)
#define GENARM_API __declspec(dllexport)
#elif defined(GENARM_SHARED)
#define GENARM_API __declspec(dllimport)
#else
#define GENARM_API
#endif
#else
#define GENARM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Grows when a struct below changes its layout or a function its meaning; compare with genarm_abi_version().
#define GENARM_ABI_VERSION 1
GENARM_API int genarm_abi_version(void);

// Tokens in a tile of the vocabulary: the unit of the draw, the same on every backend.
#define GENARM_TILE 1024

typedef enum {
  GENARM_OK = 0,
  GENARM_INVALID_ARGUMENT = 1,
  GENARM_OUT_OF_MEMORY = 2,
  GENARM_UNSUPPORTED = 3,  // the instruction set asked for is not this machine's
  GENARM_CUDA_ERROR = 4,   // the CUDA runtime's, in its words (genarm_kernels_cuda.h)
} genarm_result;

// What lies between the seeds of a call's rows where one number seeds them all: 2^64 divided by the golden ratio. Calls
// with seeds 0, 1, 2, ... have no row's seed in common, as a step of 1 would give them.
#define GENARM_SEED_STEP ((int64_t)0x9E3779B97F4A7C15u)

// Filled when a call does not return GENARM_OK; pass NULL to do without the words.
typedef struct {
  char message[256];
} genarm_error;

typedef enum { GENARM_FLOAT32 = 0, GENARM_BFLOAT16 = 1, GENARM_FLOAT16 = 2 } genarm_dtype;

// The status of a row.
enum { GENARM_DRAWN = 0, GENARM_BAD_ROW = 1, GENARM_NO_ALLOWED_TOKEN = 2 };

// Instruction sets, the plainest first. GENARM_ISA_AUTO takes the best this machine has, or the one that the
// environment variable GENARM_CPU_ISA (portable, avx2, avx512) named at the first call of the process. All give the
// same bits.
typedef enum { GENARM_ISA_AUTO = 0, GENARM_ISA_PORTABLE = 1, GENARM_ISA_AVX2 = 2, GENARM_ISA_AVX512 = 3 } genarm_isa;

// Whether this machine runs `isa`. AUTO: whether what GENARM_CPU_ISA names can run.
GENARM_API int genarm_isa_supported(genarm_isa isa);
// "portable", "avx2" or "avx512"; for AUTO the name of what it takes. NULL when that cannot run.
GENARM_API const char* genarm_isa_name(genarm_isa isa);

// Logits of one model: `vocab_size` elements a row, contiguous, of the call's dtype.
typedef struct {
  const void* data;
  int64_t row_stride;  // in elements
} genarm_logits;

typedef struct {
  const float* data;
  int64_t stride;
} genarm_floats;

typedef struct {
  const int64_t* data;
  int64_t stride;
} genarm_ints;

// Runs task(data, 0) ... task(data, count - 1), each once, in any order and on any threads, and returns when all are
// done. An engine fills it with its own pool; a zeroed one means the calling thread alone.
typedef struct {
  void (*run)(void* context, int count, void (*task)(void* data, int index), void* data);
  void* context;
  int threads;  // how many tasks to split a call into at most
} genarm_executor;

// What both operations read. Zero the struct first: what is left zero is automatic, empty, off, or neutral (a parameter
// whose data is NULL: weight and temperature 1, no filter, seed and position 0).
typedef struct {
  size_t struct_size;  // sizeof the struct that holds this one: tells a header of another version
  genarm_dtype dtype;
  genarm_isa isa;
  int64_t rows;                 // B >= 0
  int64_t vocab_size;           // 1 <= V < 2^31: tokens from here on are never read
  int64_t arms;                 // N >= 0
  const genarm_logits* logits;  // [1 + N]: the base, then the ARMs
  genarm_floats base_weight;
  const float* weights;        // [B, N]; may be NULL when N = 0
  int64_t weights_row_stride;  // 0: one set of weights for every row
  int64_t weights_arm_stride;
  genarm_floats temperature;
  const int32_t* token_mask;  // NULL, or [B, >= ceil(V / 32)]: bit v % 32 of word v / 32 set = allowed
  int64_t token_mask_row_stride;
  int64_t token_mask_word_stride;  // 0: the words of a row lie side by side
  genarm_executor executor;
  void* workspace;  // NULL: allocated for the call
  size_t workspace_size;
} genarm_inputs;

typedef struct {
  genarm_inputs in;
  genarm_ints top_k;     // <= 0 or >= V: off
  genarm_floats top_p;   // 1: off
  genarm_floats min_p;   // 0: off
  genarm_ints seed;      // 64 bits; row b draws with data[b * stride] + b * seed_step (wrapping)
  int64_t seed_step;     // of one seed for all rows: GENARM_SEED_STEP
  genarm_ints position;  // 64 bits: the index of the token being drawn; the caller advances it
  // Outputs. The four float fields are all given or all NULL (which spares their cost).
  int64_t* token;       // [B], -1 where none was drawn
  float* logprob;       // [B]
  float* log_mass;      // [B]
  int32_t* kept;        // [B]
  float* base_logprob;  // [B]
  float* arm_logprobs;  // [B, N]; may be NULL when N = 0
  int32_t* status;      // [B]
} genarm_guided_step_args;

typedef struct {
  genarm_inputs in;
  float* logprobs;  // [B, V]
  int64_t logprobs_row_stride;
} genarm_guided_log_softmax_args;

// Bytes of workspace that a call with these arguments wants: with filters a float32 row a thread and about 4 % more,
// without them about 2 % of a row. It depends on the numbers behind the filters' pointers: an engine whose requests
// change them asks with a top_p below 1, the largest batch and the threads it will use, and keeps that.
GENARM_API genarm_result genarm_guided_step_workspace(const genarm_guided_step_args* args, size_t* bytes,
                                                      genarm_error* error);
GENARM_API genarm_result genarm_guided_step(const genarm_guided_step_args* args, genarm_error* error);

// log p of every token: -inf where not allowed, NaN throughout a row that guided_step would give status 1.
GENARM_API genarm_result genarm_guided_log_softmax_workspace(const genarm_guided_log_softmax_args* args, size_t* bytes,
                                                             genarm_error* error);
GENARM_API genarm_result genarm_guided_log_softmax(const genarm_guided_log_softmax_args* args, genarm_error* error);

// A pool of `threads` - 1 threads and the caller's own, for engines that have none. One call uses it at a time; a
// second one at the same time runs on its own thread. Not to be used in a child of fork().
typedef struct genarm_thread_pool genarm_thread_pool;
GENARM_API genarm_result genarm_thread_pool_create(int threads, genarm_thread_pool** pool, genarm_error* error);
GENARM_API genarm_executor genarm_thread_pool_executor(genarm_thread_pool* pool);
GENARM_API void genarm_thread_pool_destroy(genarm_thread_pool* pool);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // GENARM_KERNELS_H_
