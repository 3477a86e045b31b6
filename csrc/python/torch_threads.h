// The threads that a call from Python runs on: torch's own where torch has any, and the interpreter's lock.
#ifndef GENARM_PYTHON_TORCH_THREADS_H_
#define GENARM_PYTHON_TORCH_THREADS_H_

#include <Python.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "genarm_kernels.h"

namespace genarm {
namespace bindings {

// Forked since this module was loaded: the parent's threads are not there. A fork before that cannot be known; there
// calls wait for the threads of torch's OpenMP, as torch's own operations do.
inline bool in_forked_child = false;
inline void watch_forks() {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif
}

// The OpenMP runtime that torch has loaded, if there is one: its threads are awake right after a forward pass, and a
// second pool would compete with them for the cores.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline GompParallel gomp_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

struct Region {
  void (*task)(void*, int);
  void* data;
  int count;
  std::atomic<int> next;
};

// On a team of torch's own size whatever the count: a smaller one would end threads that torch's next operation has to
// make anew.
inline void run_on_gomp(void* threads, int count, void (*task)(void*, int), void* data) {
  Region region{task, data, count, {0}};
  const auto body = [](void* self) {
    Region& region = *static_cast<Region*>(self);
    for (int i; (i = region.next.fetch_add(1)) < region.count;) region.task(region.data, i);
  };
  gomp_parallel()(body, &region, static_cast<unsigned>(reinterpret_cast<intptr_t>(threads)), 0);
}

// Holds the pool while a call uses it.
struct Executor {
  genarm_executor executor{};
  std::shared_ptr<genarm_thread_pool> pool;

  explicit Executor(int threads) {
    if (threads < 2 || in_forked_child) return;
    if (gomp_parallel()) {
      executor = {run_on_gomp, reinterpret_cast<void*>(intptr_t{threads}), threads};
      return;
    }
    static std::mutex mutex;
    // Never destroyed: at the end of a forked child there would be no threads to join.
    static auto& shared = *new std::shared_ptr<genarm_thread_pool>;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!shared || genarm_thread_pool_executor(shared.get()).threads != threads) {
      genarm_thread_pool* made;
      if (genarm_thread_pool_create(threads, &made, nullptr) != GENARM_OK) return;  // the calling thread alone, then
      shared.reset(made, genarm_thread_pool_destroy);
    }
    pool = shared;
    executor = genarm_thread_pool_executor(pool.get());
  }
};

// Takes back the interpreter that PyEval_SaveThread let go. When that has come to its end meanwhile, CPython
// before 3.14 ends a daemon thread by unwinding its stack, which no destructor of C++ is prepared for: the thread
// sleeps until the process is gone, as later versions have it.
inline void take_interpreter(PyThreadState* state) {
  struct Sleep {
    bool over = false;
    ~Sleep() {
      while (!over) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  } sleep;
  PyEval_RestoreThread(state);
  sleep.over = true;
}

}  // namespace bindings
}  // namespace genarm

#endif  // GENARM_PYTHON_TORCH_THREADS_H_
