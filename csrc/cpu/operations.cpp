// The operations of the C interface on a CPU: arguments checked, rows and tiles shared out, results written.
#include <atomic>
#include <cstdlib>

#include "common/check.h"
#include "cpu/float_mode.h"
#include "cpu/row.h"

namespace genarm {

RowTotals total(const Row& row) {
  RowTotals totals{GENARM_DRAWN, -kInfinity, {}, 0};
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    const TileSummary& summary = row.summaries[tile];
    if (summary.allowed < 0) return {GENARM_BAD_ROW, -kInfinity, {}, 0};
    totals.allowed += summary.allowed;
    totals.mass.add(summary.mass);
    if (summary.top > totals.top) totals.top = summary.top;
  }
  if (totals.allowed == 0) totals.status = GENARM_NO_ALLOWED_TOKEN;
  return totals;
}

namespace {

// A share of work that is worth waking a thread for: about 4 microseconds.
constexpr int64_t kTilesPerTask = 8;

// Hands out a block of memory in aligned pieces; without a block it measures.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = block_ ? reinterpret_cast<T*>(block_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

float weight(const genarm_inputs& in, int64_t row, int64_t operand) {
  return operand == 0 ? value(in.base_weight, row, 1)
                      : in.weights[row * in.weights_row_stride + (operand - 1) * in.weights_arm_stride];
}

const void* logits(const genarm_inputs& in, int64_t row, int64_t operand) {
  const int64_t size = in.dtype == GENARM_FLOAT32 ? 4 : 2;
  return static_cast<const char*>(in.logits[operand].data) + row * in.logits[operand].row_stride * size;
}

// What a call needs besides its arguments.
struct Needs {
  bool candidates;    // filters
  bool operand_sums;  // the log-softmax of every operand
};

Needs needs_of(const genarm_guided_step_args& args) {
  Needs needs{false, args.logprob != nullptr};
  const bool same = args.top_k.stride == 0 && args.top_p.stride == 0 && args.min_p.stride == 0;
  const int64_t rows = same && args.in.rows > 1 ? 1 : args.in.rows;
  for (int64_t b = 0; b < rows && !needs.candidates; ++b) needs.candidates = filtered(args, b);
  return needs;
}

// The arguments, and what only a CPU's call has.
template <class Args>
genarm_result check_call(const Args& args, genarm_error* error) {
  const genarm_result result = check(args, error);
  if (result != GENARM_OK || args.in.rows == 0) return result;
  if (args.in.executor.run && args.in.executor.threads < 1) {
    return fail(error, GENARM_INVALID_ARGUMENT, "executor.threads: expected at least 1");
  }
  if (!kernels_of(args.in.isa)) {
    return fail(error, GENARM_UNSUPPORTED, "isa: this machine does not run %s",
                args.in.isa == GENARM_ISA_AUTO ? "what GENARM_CPU_ISA names (portable, avx2 or avx512)" : "that one");
  }
  return GENARM_OK;
}

// The arrays of one row in the making.
void take_arrays(Arena& arena, const genarm_inputs& in, const Needs& needs, Row* row) {
  const int64_t tiles = (in.vocab_size + kTile - 1) / kTile, operands = in.arms + 1;
  row->operands = arena.take<Operand>(operands);
  row->used = arena.take<int>(operands);
  row->summaries = arena.take<TileSummary>(tiles);
  row->operand_partials = needs.operand_sums ? arena.take<Partial>(tiles * operands) : nullptr;
  row->z = nullptr;
  row->lane_tops = nullptr;
  if (needs.candidates) {
    row->z = arena.take<float>(in.vocab_size + 2 * kLanes);
    row->lane_tops = arena.take<float>((tiles + 1) * kLanes);
    row->offsets = arena.take<int64_t>(tiles + 1);
    row->weights = arena.take<double>(tiles);
  }
}

// Who does what: `whole` rows are drawn one per task, the rest one after another with their tiles shared out.
struct Plan {
  int64_t whole;
  int row_tasks, tile_tasks;

  explicit Plan(const genarm_inputs& in) {
    const int64_t tiles = (in.vocab_size + kTile - 1) / kTile;
    const int64_t threads = in.executor.run ? in.executor.threads : 1;
    const auto share = [threads](int64_t all) {
      const int64_t tasks = all / kTilesPerTask;
      return static_cast<int>(tasks < 1 ? 1 : tasks < threads ? tasks : threads);
    };
    tile_tasks = share(tiles);
    row_tasks = share(tiles * in.rows);
    if (row_tasks > in.rows) row_tasks = static_cast<int>(in.rows);
    // Rows that are left over are worth sharing out while few: what follows a row's tiles is done by one thread.
    const int64_t left = in.rows % tile_tasks;
    whole = left > 1 && 2 * left >= tile_tasks ? in.rows : in.rows - left;
    if (tile_tasks == 1) whole = in.rows;
    if (whole == 0) row_tasks = 1;
  }
};

size_t workspace_size(const genarm_inputs& in, const Needs& needs) {
  if (in.rows == 0) return 0;
  Arena arena(nullptr);
  Row row;
  take_arrays(arena, in, needs, &row);
  return arena.used() * static_cast<size_t>(Plan(in).row_tasks) + 64;  // 64: to align the block
}

// Memory for the call: the caller's, or its own.
class Workspace {
 public:
  Workspace(const genarm_inputs& in, size_t size) : own_(nullptr), block_(in.workspace) {
    if (!block_) block_ = own_ = std::malloc(size);
  }
  ~Workspace() { std::free(own_); }
  Workspace(const Workspace&) = delete;
  void* block() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block_) + 63) / 64 * 64); }
  explicit operator bool() const { return block_ != nullptr; }

 private:
  void* own_;
  void* block_;
};

// False when the row's weights or its temperature cannot be used.
bool prepare(const genarm_inputs& in, const RowKernels& kernels, int64_t b, bool greedy_allowed, Row* row) {
  row->vocab = in.vocab_size;
  row->tiles = (in.vocab_size + kTile - 1) / kTile;
  row->dtype = in.dtype;
  row->token_mask = in.token_mask ? in.token_mask + b * in.token_mask_row_stride : nullptr;
  row->token_mask_stride = in.token_mask_word_stride == 0 ? 1 : in.token_mask_word_stride;
  const float temperature = value(in.temperature, b, 1);
  if (!(temperature >= 0 && temperature < kInfinity)) return false;
  row->greedy = temperature == 0;
  if (row->greedy && !greedy_allowed) return false;
  row->temperature = row->greedy ? 1 : temperature;
  const float scale = kLog2E / row->temperature;
  row->scale = scale < kMaxFloat ? scale : kMaxFloat;
  row->operand_count = static_cast<int>(in.arms) + 1;
  row->used_count = 0;
  for (int i = 0; i < row->operand_count; ++i) {
    const float w = weight(in, b, i);
    if (!(w < kInfinity && w > -kInfinity)) return false;
    row->operands[i] = {logits(in, b, i), w, 0};
    if (w != 0) row->used[row->used_count++] = i;
  }
  kernels.set_references(*row);
  return true;
}

bool in_unit_interval(float x) { return x >= 0 && x <= 1; }

bool prepare(const genarm_guided_step_args& args, const RowKernels& kernels, int64_t b, Row* row) {
  row->top_k = value(args.top_k, b);
  row->top_p = value(args.top_p, b, 1);
  row->min_p = value(args.min_p, b, 0);
  row->seed =
      static_cast<uint64_t>(value(args.seed, b)) + static_cast<uint64_t>(b) * static_cast<uint64_t>(args.seed_step);
  row->position = static_cast<uint64_t>(value(args.position, b));
  if (!in_unit_interval(row->top_p) || !in_unit_interval(row->min_p)) return false;
  if (!prepare(args.in, kernels, b, true, row)) return false;
  row->filtered = !row->greedy && filtered(args, b);
  // Without log-probabilities a sum is needed only to draw by, or to cut at a share of it.
  const bool by_k = row->top_k > 0 && row->top_k < row->vocab;
  const bool sum_needed = !row->greedy && !(row->filtered && (by_k || row->top_p >= 1));
  row->sums = args.logprob ? Sums::kGuidedAndOperands : sum_needed ? Sums::kGuided : Sums::kNone;
  return true;
}

double own_logprob(const genarm_guided_step_args& args, const Row& row, int operand, int64_t token) {
  PartialSum sum;
  for (int64_t tile = 0; tile < row.tiles; ++tile) sum.add(row.operand_partials[tile * row.operand_count + operand]);
  const void* x = row.operands[operand].x;
  float logit = 0;
  switch (args.in.dtype) {
    case GENARM_FLOAT32:
      logit = static_cast<const float*>(x)[token];
      break;
    case GENARM_BFLOAT16:
      logit = to_float(static_cast<const BFloat16*>(x)[token]);
      break;
    case GENARM_FLOAT16:
      logit = to_float(static_cast<const Float16*>(x)[token]);
      break;
  }
  return log_probability(-sum.log_from(logit, kLog2E));
}

void write(const genarm_guided_step_args& args, int64_t b, const Drawn& drawn, const Row& row) {
  args.token[b] = drawn.token;
  args.kept[b] = drawn.kept;
  args.status[b] = drawn.status;
  if (!args.logprob) return;
  const bool is_drawn = drawn.status == GENARM_DRAWN;
  args.logprob[b] = static_cast<float>(drawn.logprob);
  args.log_mass[b] = static_cast<float>(drawn.log_mass);
  for (int64_t i = 0; i <= args.in.arms; ++i) {
    const double own = is_drawn ? own_logprob(args, row, static_cast<int>(i), drawn.token) : NAN;
    (i == 0 ? args.base_logprob[b] : args.arm_logprobs[b * args.in.arms + i - 1]) = static_cast<float>(own);
  }
}

// Runs task(index) for index in [0, count) on the executor.
template <class Task>
void run(const genarm_executor& executor, int count, Task& task) {
  const auto call = [](void* data, int index) {
    const DefaultFloatMode mode;
    (*static_cast<Task*>(data))(index);
  };
  if (count == 1) {
    call(&task, 0);
  } else {
    executor.run(executor.context, count, call, &task);
  }
}

// Pass 1 over [0, tiles) of the row, shared out.
void read_row(const genarm_inputs& in, const RowKernels& kernels, const Row& row, int tasks) {
  auto task = [&](int index) { kernels.read_tiles(row, row.tiles * index / tasks, row.tiles * (index + 1) / tasks); };
  run(in.executor, tasks, task);
}

// Calls each_row(b, row, tasks) for every row, with `tasks` to share its tiles out to.
template <class EachRow>
void for_each_row(const genarm_inputs& in, const Needs& needs, void* block, EachRow each_row) {
  const Plan plan(in);
  std::atomic<int64_t> next{0};
  // One set of arrays per task; they are cut out of the block in the tasks' order.
  const size_t stride = (workspace_size(in, needs) - 64) / static_cast<size_t>(plan.row_tasks);
  const auto row_of = [&](int task) {
    Arena own(static_cast<char*>(block) + stride * static_cast<size_t>(task));
    Row row{};
    take_arrays(own, in, needs, &row);
    return row;
  };
  auto whole_rows = [&](int task) {
    Row row = row_of(task);
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < plan.whole;) each_row(b, row, 1);
  };
  if (plan.whole > 0) run(in.executor, plan.row_tasks, whole_rows);
  const DefaultFloatMode mode;
  Row row = row_of(0);
  for (int64_t b = plan.whole; b < in.rows; ++b) each_row(b, row, plan.tile_tasks);
}

}  // namespace
}  // namespace genarm

using genarm::fail;

genarm_result genarm_guided_step_workspace(const genarm_guided_step_args* args, size_t* bytes, genarm_error* error) {
  if (!args || !bytes) return fail(error, GENARM_INVALID_ARGUMENT, "args and bytes: expected pointers, got NULL");
  const genarm_result result = genarm::check_call(*args, error);
  const genarm::DefaultFloatMode mode;
  if (result == GENARM_OK) *bytes = genarm::workspace_size(args->in, genarm::needs_of(*args));
  return result;
}

genarm_result genarm_guided_step(const genarm_guided_step_args* args, genarm_error* error) {
  using namespace genarm;
  if (!args) return fail(error, GENARM_INVALID_ARGUMENT, "args: expected a pointer, got NULL");
  const genarm_result result = check_call(*args, error);
  if (result != GENARM_OK || args->in.rows == 0) return result;
  const DefaultFloatMode mode;
  const Needs needs = needs_of(*args);
  const size_t size = workspace_size(args->in, needs);
  if (args->in.workspace && args->in.workspace_size < size) {
    return fail(error, GENARM_INVALID_ARGUMENT, "workspace_size: expected at least %zu, got %zu", size,
                args->in.workspace_size);
  }
  const Workspace workspace(args->in, size);
  if (!workspace) return fail(error, GENARM_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes", size);

  const RowKernels& kernels = *kernels_of(args->in.isa);
  for_each_row(args->in, needs, workspace.block(), [&](int64_t b, Row& row, int tasks) {
    Drawn drawn{GENARM_BAD_ROW, -1, 0, NAN, NAN};
    if (prepare(*args, kernels, b, &row)) {
      read_row(args->in, kernels, row, tasks);
      drawn = kernels.draw(row);
    }
    write(*args, b, drawn, row);
  });
  return GENARM_OK;
}

genarm_result genarm_guided_log_softmax_workspace(const genarm_guided_log_softmax_args* args, size_t* bytes,
                                                  genarm_error* error) {
  if (!args || !bytes) return fail(error, GENARM_INVALID_ARGUMENT, "args and bytes: expected pointers, got NULL");
  const genarm_result result = genarm::check_call(*args, error);
  if (result == GENARM_OK) *bytes = genarm::workspace_size(args->in, {});
  return result;
}

genarm_result genarm_guided_log_softmax(const genarm_guided_log_softmax_args* args, genarm_error* error) {
  using namespace genarm;
  if (!args) return fail(error, GENARM_INVALID_ARGUMENT, "args: expected a pointer, got NULL");
  const genarm_result result = check_call(*args, error);
  if (result != GENARM_OK || args->in.rows == 0) return result;
  const size_t size = workspace_size(args->in, {});
  if (args->in.workspace && args->in.workspace_size < size) {
    return fail(error, GENARM_INVALID_ARGUMENT, "workspace_size: expected at least %zu, got %zu", size,
                args->in.workspace_size);
  }
  const Workspace workspace(args->in, size);
  if (!workspace) return fail(error, GENARM_OUT_OF_MEMORY, "no memory for a workspace of %zu bytes", size);

  const RowKernels& kernels = *kernels_of(args->in.isa);
  for_each_row(args->in, {}, workspace.block(), [&](int64_t b, Row& row, int tasks) {
    float* out = args->logprobs + b * args->logprobs_row_stride;
    int status = GENARM_BAD_ROW;
    RowTotals totals;
    if (prepare(args->in, kernels, b, false, &row)) {
      row.sums = Sums::kGuided;
      row.z = out;
      read_row(args->in, kernels, row, tasks);
      totals = total(row);
      status = totals.status;
    }
    if (status != GENARM_DRAWN) {
      const float fill = status == GENARM_BAD_ROW ? NAN : -kInfinity;
      for (int64_t v = 0; v < args->in.vocab_size; ++v) out[v] = fill;
      return;
    }
    const double log_largest = log_probability(-totals.mass.log_from(totals.top, row.scale));
    auto task = [&](int index) {
      kernels.normalise(row, totals.top, log_largest, row.tiles * index / tasks, row.tiles * (index + 1) / tasks);
    };
    run(args->in.executor, tasks, task);
  });
  return GENARM_OK;
}
