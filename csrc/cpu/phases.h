// Phases of work, one after the other, on as many threads as come.
//
// A phase is cut into chunks, which threads take as they get to them; the next begins when the last chunk of one is
// done. Nothing waits for a thread that has not come: a single one does all the work.
#ifndef GENARM_CPU_PHASES_H_
#define GENARM_CPU_PHASES_H_

#include <atomic>
#include <memory>
#include <thread>
#include <vector>
#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

#include "cpu/float_mode.h"
#include "genarm_kernels.h"

namespace genarm {

class Phases {
 public:
  // work(phase, chunk) for each chunk of each phase; chunks[p] may be 0.
  template <class Work>
  void run(const genarm_executor& executor, const std::vector<int>& chunks, const Work& work) {
    if (chunks.size() > size_) {
      counters_.reset(new Counter[chunks.size()]);
      size_ = chunks.size();
    }
    for (size_t p = 0; p < chunks.size(); ++p) {
      counters_[p].next.store(0, std::memory_order_relaxed);
      counters_[p].done.store(0, std::memory_order_relaxed);
    }
    struct Call {
      const Phases& phases;
      const std::vector<int>& chunks;
      const Work& work;
    } call{*this, chunks, work};
    const auto take_part = [](void* data, int) {
      const Call& call = *static_cast<Call*>(data);
      const DefaultFloatMode mode;
      for (size_t p = 0; p < call.chunks.size(); ++p) {
        Counter& counter = call.phases.counters_[p];
        const int count = call.chunks[p];
        for (int c; (c = counter.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
          call.work(static_cast<int>(p), c);
          counter.done.fetch_add(1, std::memory_order_release);
        }
        for (int spins = 0; counter.done.load(std::memory_order_acquire) < count; ++spins) wait(spins);
      }
    };
    if (executor.run && executor.threads > 1) {
      executor.run(executor.context, executor.threads, take_part, &call);
    } else {
      take_part(&call, 0);
    }
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int> next{0}, done{0};
  };

  // The others are some microseconds from done, unless the machine has given their core away.
  static void wait(int spins) {
#if defined(__SSE2__) || defined(_M_X64)
    _mm_pause();
#endif
    if (spins > 2000) std::this_thread::yield();
  }

  std::unique_ptr<Counter[]> counters_;
  size_t size_ = 0;
};

}  // namespace genarm

#endif  // GENARM_CPU_PHASES_H_
