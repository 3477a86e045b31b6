// The thread pool of the C interface, for engines that bring none.
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/error.h"
#include "genarm_kernels.h"

struct genarm_thread_pool {
  explicit genarm_thread_pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~genarm_thread_pool() { stop(); }

  int threads() const { return static_cast<int>(workers.size()) + 1; }

  void run(int count, void (*task)(void*, int), void* data) {
    std::unique_lock<std::mutex> busy(one_call, std::try_to_lock);
    if (!busy.owns_lock() || workers.empty()) {
      for (int i = 0; i < count; ++i) task(data, i);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex);
    current = {task, data, count};
    next = 0;
    unfinished = count;
    wake.notify_all();
    take_tasks(lock);
    done.wait(lock, [this] { return unfinished == 0; });
  }

 private:
  struct Call {
    void (*task)(void*, int);
    void* data;
    int count;
  };

  // Tasks are few and long (one a thread), so one lock for all is not in the way.
  void take_tasks(std::unique_lock<std::mutex>& lock) {
    while (next < current.count) {
      const int index = next++;
      const Call call = current;
      lock.unlock();
      call.task(call.data, index);
      lock.lock();
      if (--unfinished == 0) done.notify_one();
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      wake.wait(lock, [this] { return stopping || next < current.count; });
      if (stopping) return;
      take_tasks(lock);
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  std::mutex one_call;
  std::mutex mutex;  // guards all below
  std::condition_variable wake, done;
  Call current{nullptr, nullptr, 0};
  int next = 0, unfinished = 0;
  bool stopping = false;
  std::vector<std::thread> workers;
};

genarm_result genarm_thread_pool_create(int threads, genarm_thread_pool** pool, genarm_error* error) {
  if (!pool) return genarm::fail(error, GENARM_INVALID_ARGUMENT, "pool: expected a pointer, got NULL");
  *pool = nullptr;
  if (threads < 1) return genarm::fail(error, GENARM_INVALID_ARGUMENT, "threads: expected at least 1, got %d", threads);
  try {
    *pool = new genarm_thread_pool(threads);
  } catch (const std::exception& e) {
    return genarm::fail(error, GENARM_OUT_OF_MEMORY, "cannot start %d threads: %s", threads - 1, e.what());
  }
  return GENARM_OK;
}

genarm_executor genarm_thread_pool_executor(genarm_thread_pool* pool) {
  if (!pool) return {nullptr, nullptr, 0};
  return {[](void* self, int count, void (*task)(void*, int), void* data) {
            static_cast<genarm_thread_pool*>(self)->run(count, task, data);
          },
          pool, pool->threads()};
}

void genarm_thread_pool_destroy(genarm_thread_pool* pool) { delete pool; }
