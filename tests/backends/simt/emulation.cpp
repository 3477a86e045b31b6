// The threads of the emulation: see emulation.h. No sanitizer instruments this file: each is told of the threads.
#include "emulation.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "SIMT emulation: %s\n", why);
  std::abort();
}

// What comes before such a point is known after it to all that meet there.
void release([[maybe_unused]] void* point) {
#if defined(SIMT_TSAN)
  __tsan_release(point);
#endif
}
void acquire([[maybe_unused]] void* point) {
#if defined(SIMT_TSAN)
  __tsan_acquire(point);
#endif
}

struct Thread;

// A number of threads that wait for one another. Those that have ended are not waited for.
struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

enum class Kind { kShuffle, kVote, kMinimum, kSyncwarp };

struct Warp {
  Barrier barrier;
  Kind kind{};
  uint64_t values[2][kWarp];
};

struct Block {
  std::unique_ptr<Warp[]> warps;
  Barrier barrier;
  char* shared = nullptr;
  int64_t shared_bytes = 0;
  int rank = 0, alive = 0;
  Index index{};
};

struct Thread {
  char* stack = nullptr;
  void* saved = nullptr;  // its stack pointer while it does not run
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  Block* block = nullptr;
  Index index{};
  unsigned exchanges = 0;
  bool ended = false;
  bool arrived = false;  // at the cluster's barrier, in the phase that is not over
  uint64_t phase = 0;    // of the cluster's barrier that it arrived in
};

struct Cluster {
  std::vector<Block> blocks;
  int alive = 0, missing = 0;  // missing: alive and not arrived in this phase
  uint64_t phase = 0;
  std::vector<Thread*> waiting;
};

std::vector<Thread> threads;  // kept with their stacks
Cluster cluster;
std::vector<Thread*> ready;
Thread* current = nullptr;
void* scheduler_stack = nullptr;
[[maybe_unused]] void* scheduler_tsan = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;
const std::function<void()>* kernel_of_threads = nullptr;
uint64_t random_state = 0x9E3779B97F4A7C15u;

#if defined(__x86_64__)
// Saves what a call must preserve and the stack pointer, and takes up another stack where it was left.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#elif defined(__aarch64__)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "the emulation switches stacks on x86-64 and arm64"
#endif

void to_scheduler() {
  [[maybe_unused]] Thread& self = *current;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(self.ended ? nullptr : &self.fake_stack, scheduler_bottom, scheduler_size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#endif
  simt_switch(&self.saved, scheduler_stack);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

void resume(Thread& thread) {
  current = &thread;
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStack);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(thread.tsan, 1);  // 1: without this ordering them
#endif
  simt_switch(&scheduler_stack, thread.saved);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

// Thread by thread: ThreadSanitizer takes a memmove for one of the thread that runs.
void release_waiting(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) ready.push_back(thread);
  waiting.clear();
}

void open_if_complete(Barrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.arrived == 0) return;
  barrier.arrived = 0;
  release_waiting(barrier.waiting);
}

void wait(Barrier& barrier, bool ordering) {
  if (ordering) release(&barrier);
  ++barrier.arrived;
  barrier.waiting.push_back(current);
  open_if_complete(barrier);
  to_scheduler();
  if (ordering) acquire(&barrier);
}

// Hands out every lane's value to the warp: where they lie until the lane's next exchange.
const uint64_t* exchange(unsigned mask, Kind kind, uint64_t value) {
  Warp& warp = current->block->warps[current->index.x / kWarp];
  if (mask != ~0u || warp.barrier.expected != kWarp) die("a warp's operation without all of its lanes");
  if (warp.barrier.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) die("the lanes of a warp meet in different operations");
  uint64_t* const values = warp.values[current->exchanges++ % 2];
  values[current->index.x % kWarp] = value;
  wait(warp.barrier, kind == Kind::kSyncwarp);  // a shuffle orders no memory
  return values;
}

void end_phase_if_complete() {
  if (cluster.missing > 0) return;
  ++cluster.phase;
  cluster.missing = cluster.alive;
  release_waiting(cluster.waiting);
}

void thread_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*kernel_of_threads)();
  Thread& self = *current;
  release(&kernel_of_threads);
  Block& block = *self.block;
  self.ended = true;
  Barrier& warp = block.warps[self.index.x / kWarp].barrier;
  --warp.expected;
  open_if_complete(warp);
  --block.barrier.expected;
  open_if_complete(block.barrier);
  --cluster.alive;
  if (!(self.arrived && self.phase == cluster.phase)) --cluster.missing;
  end_phase_if_complete();
  release(&block.alive);
  if (--block.alive == 0) {
    acquire(&block.alive);  // what its own threads did is over; another block's access has to be ordered by the kernel
    std::free(block.shared);
    block.shared = nullptr;
  }
  to_scheduler();
  die("an ended thread runs");
}

void start(Thread& thread, Block& block, unsigned index) {
#if defined(SIMT_TSAN)
  constexpr bool kAnew = true;  // or what two threads in turn do there is taken for a race
#else
  constexpr bool kAnew = false;
#endif
  char* stack = thread.stack;
  if (!stack || kAnew) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (stack ? MAP_FIXED : 0);
    void* memory = mmap(stack, kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) die("no memory for a thread's stack");
    stack = static_cast<char*>(memory);
  }
  thread = Thread{};
  thread.stack = stack;
  thread.block = &block;
  thread.index.x = index;
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
#if defined(__x86_64__)
  top[0] = reinterpret_cast<void*>(thread_main);  // where the switch returns to
  thread.saved = top - 6;
#else
  thread.saved = reinterpret_cast<char*>(top) - 176;
  static_cast<void**>(thread.saved)[11] = reinterpret_cast<void*>(thread_main);
#endif
#if defined(SIMT_TSAN)
  thread.tsan = __tsan_create_fiber(0);
#endif
  ready.push_back(&thread);
}

unsigned random_below(size_t count) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((random_state >> 33) % count);
}

void run_cluster(const Launch& launch, int64_t first_block, int size) {
  cluster = Cluster{};
  cluster.blocks = std::vector<Block>(static_cast<size_t>(size));
  cluster.alive = cluster.missing = size * launch.threads;
  if (threads.size() < static_cast<size_t>(cluster.alive)) threads.resize(static_cast<size_t>(cluster.alive));
  ready.reserve(threads.size());  // nothing is allocated while threads run
  cluster.waiting.reserve(threads.size());
  size_t next = 0;
  for (int rank = 0; rank < size; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    block.rank = rank;
    block.index.x = static_cast<unsigned>(first_block + rank);
    block.alive = block.barrier.expected = launch.threads;
    block.barrier.waiting.reserve(static_cast<size_t>(launch.threads));
    block.warps = std::make_unique<Warp[]>(static_cast<size_t>(launch.threads / kWarp));
    block.shared_bytes = launch.shared_bytes;
    block.shared = static_cast<char*>(std::malloc(static_cast<size_t>(launch.shared_bytes)));
    if (!block.shared && launch.shared_bytes > 0) die("no memory for a block's shared memory");
    std::memset(block.shared, 0xA5, static_cast<size_t>(launch.shared_bytes));
    for (int i = 0; i < launch.threads; ++i) {
      Barrier& warp = block.warps[static_cast<size_t>(i / kWarp)].barrier;
      warp.expected = kWarp;
      warp.waiting.reserve(kWarp);
      start(threads[next++], block, static_cast<unsigned>(i));
    }
  }
  while (!ready.empty()) {
    Thread*& drawn = ready[random_below(ready.size())];
    Thread* const thread = drawn;
    drawn = ready.back();
    ready.pop_back();
    resume(*thread);
  }
  if (cluster.alive > 0) die("deadlock: threads wait at barriers that others never reach");
#if defined(SIMT_TSAN)
  for (size_t i = 0; i < next; ++i) __tsan_destroy_fiber(threads[i].tsan);
#endif
}

}  // namespace

Index thread_index() { return current->index; }
Index block_index() { return current->block->index; }
char* shared_memory() { return current->block->shared; }
int cluster_rank() { return current->block->rank; }

void* in_block(void* x, int rank) {
  const Block& own = *current->block;
  const int64_t offset = static_cast<char*>(x) - own.shared;
  if (offset < 0 || offset >= own.shared_bytes)
    die("an address of another block's is sought that is not shared memory");
  if (rank < 0 || static_cast<size_t>(rank) >= cluster.blocks.size()) die("no such block in the cluster");
  char* const theirs = cluster.blocks[static_cast<size_t>(rank)].shared;
  if (!theirs) die("the memory of a block that has ended is sought");
  return theirs + offset;
}

uint64_t shuffle(unsigned mask, uint64_t value, int source) { return exchange(mask, Kind::kShuffle, value)[source]; }

bool any(unsigned mask, bool value) {
  const uint64_t* all = exchange(mask, Kind::kVote, value);
  return std::any_of(all, all + kWarp, [](uint64_t each) { return each != 0; });
}

int64_t least(unsigned mask, int64_t value) {
  const uint64_t* all = exchange(mask, Kind::kMinimum, static_cast<uint64_t>(value));
  for (int lane = 0; lane < kWarp; ++lane) value = std::min(value, static_cast<int64_t>(all[lane]));
  return value;
}

void sync_warp() { exchange(~0u, Kind::kSyncwarp, 0); }

void sync_threads() { wait(current->block->barrier, true); }

void cluster_arrive(bool ordering) {
  if (current->arrived) die("a thread arrives twice at its cluster's barrier");
  if (ordering) release(&cluster.phase);
  current->arrived = true;
  current->phase = cluster.phase;
  --cluster.missing;
  end_phase_if_complete();
}

void cluster_wait() {
  if (!current->arrived) die("a thread waits at its cluster's barrier where it has not arrived");
  if (current->phase == cluster.phase) {
    cluster.waiting.push_back(current);
    to_scheduler();
  }
  current->arrived = false;
  acquire(&cluster.phase);
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  const int size = launch.cluster > 0 ? launch.cluster : 1;
  if (launch.blocks % size != 0 || size > kLargestCluster) die("a grid that no cluster of this device fits");
  if (launch.shared_bytes > kSharedBytes) die("more shared memory than a block has");
  if (launch.threads % kWarp != 0 || launch.threads > 1024) die("a block of that many threads");
#if defined(SIMT_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  kernel_of_threads = &kernel;
  for (int64_t block = 0; block < launch.blocks; block += size) run_cluster(launch, block, size);
  acquire(&kernel_of_threads);  // the launch is over; its clusters are not ordered among themselves
}

}  // namespace simt
