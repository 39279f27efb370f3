// A persistent pool of threads. The caller runs tasks too; it never waits for a worker that has not woken.
//
// One job runs at a time. A job is `count` independent tasks. Each thread owns a contiguous range of tasks, so that it
// reads memory in one direction. When its range is empty, it takes tasks from other ranges. Which thread runs a task
// never changes the result.
//
// A thread that runs jobs holds `busy`. An errand is a call that runs several jobs in sequence. A worker runs it for
// its owner, if one is awake. Meanwhile the owner does other things, then helps like a worker until the end.
//
// Workers spin for a short while after a job, then sleep on a futex. A child of fork() has no workers: it runs every
// job alone, and must not resize the pool.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "vec.h"

namespace moe {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Spins until `ready()` or the time limit; returns whether `ready()` was true.
template <class Ready>
bool spin_until(const Ready& ready, std::chrono::microseconds most = kSpin) {
  for (int i = 0; i < 64; i++) {
    if (ready()) return true;
    __builtin_ia32_pause();
  }
  const auto deadline = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

struct Errand {
  void (*run)(Errand*);
  std::atomic<uint32_t> done;
};

class Pool {
 public:
  std::mutex busy;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Sets the number of threads, the caller included. The caller must hold `busy`.
  void resize(int threads) {
    stop_.store(true);
    epoch_.fetch_add(1);
    futex_wake_all(epoch_);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    ranges_ = std::make_unique<Range[]>(threads);
    const uint32_t seen = epoch_.load();
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i, seen] { work(i, seen); });
  }

  // Offers `errand` to the workers. It must live until `finish` has returned.
  void post(Errand& errand) {
    errand.done.store(0);
    if (Errand* other = posted_.exchange(&errand)) perform(*other);
    call_workers();
  }

  // Runs the posted errand, or helps the worker that has begun it. The caller must not hold `busy`.
  void finish(Errand& errand) {
    const FlushToZero flush;
    Errand* mine = &errand;
    if (posted_.compare_exchange_strong(mine, nullptr)) return perform(errand);
    while (!errand.done.load(std::memory_order_acquire)) {
      const uint32_t seen = epoch_.load();
      if (join_job()) {
        // The job may belong to another call, in which this thread has no thread number. If it belongs to this errand,
        // it stays so while this thread is inside.
        if (led_ == &errand) take_tasks(leader_);
        leave_job();
      }
      while (epoch_.load(std::memory_order_acquire) == seen && !errand.done.load()) await_call(seen);
    }
  }

  // Runs `task(index, thread)` for every index below `count`; returns when all have ended. The caller must hold `busy`.
  template <class Task>
  void run(int64_t count, const Task& task) {
    if (count <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < count; i++) task(i, 0);
      return;
    }
    const int threads = size();
    for (int i = 0; i < threads; i++) {
      ranges_[i].next.store(count * i / threads, std::memory_order_relaxed);
      ranges_[i].end = count * (i + 1) / threads;
    }
    context_ = &task;
    call_ = [](const void* context, int64_t index, int thread) {
      (*static_cast<const Task*>(context))(index, thread);
    };
    open();
    take_tasks(0);
    close();
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // The number of workers inside, plus `kOpen` while workers may join.
  static constexpr uint32_t kOpen = 1u << 31;

  void open() {
    door_.store(kOpen);
    call_workers();
  }

  // Starts a new epoch and returns it.
  uint32_t call_workers() {
    const uint32_t epoch = epoch_.fetch_add(1) + 1;
    if (sleepers_.load() > 0) futex_wake_all(epoch_);
    return epoch;
  }

  // Waits for the epoch after `seen`; may return too early.
  void await_call(uint32_t seen) {
    if (spin_until([this, seen] { return epoch_.load(std::memory_order_acquire) != seen; })) return;
    sleepers_.fetch_add(1);
    futex_wait(epoch_, seen);
    sleepers_.fetch_sub(1);
  }

  void perform(Errand& errand) {
    const FlushToZero flush;
    const std::lock_guard<std::mutex> lock(busy);
    complete(errand);
  }

  // The caller must hold `busy`. The owner may destroy the errand as soon as `done` is set.
  uint32_t complete(Errand& errand) {
    errand.run(&errand);
    errand.done.store(1);
    return call_workers();
  }

  // Runs the posted errand, if there is one and no other thread runs jobs; returns whether it did. `seen` becomes the
  // errand's last epoch.
  bool lead_errand(int thread, uint32_t& seen) {
    if (posted_.load() == nullptr) return false;
    const std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    Errand* errand = lock ? posted_.exchange(nullptr) : nullptr;
    if (errand == nullptr) return false;
    leader_ = thread;
    led_ = errand;
    seen = complete(*errand);
    led_ = nullptr;  // another errand may reuse the address
    return true;
  }

  void close() {
    door_.fetch_and(~kOpen);
    while (!spin_until([this] { return door_.load(std::memory_order_acquire) == 0; })) {
      waiting_.store(true);
      const uint32_t inside = door_.load();
      if (inside != 0) futex_wait(door_, inside);
      waiting_.store(false);
    }
  }

  void take_tasks(int thread) {
    const int threads = size();
    for (int i = 0; i < threads; i++) {
      Range& range = ranges_[(thread + i) % threads];
      int64_t index;
      while ((index = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end) call_(context_, index, thread);
    }
  }

  bool join_job() {
    uint32_t door = door_.load();
    while (door & kOpen) {
      if (door_.compare_exchange_weak(door, door + 1)) return true;
    }
    return false;
  }

  void leave_job() {
    const bool last = door_.fetch_sub(1) == 1;  // The door is closed and no other worker is inside.
    if (last && waiting_.load()) futex_wake_all(door_);
  }

  void work(int thread, uint32_t seen) {
    const FlushToZero flush;
    while (true) {
      while (epoch_.load(std::memory_order_acquire) == seen) await_call(seen);
      seen = epoch_.load();
      if (stop_.load()) return;
      if (lead_errand(thread, seen)) continue;
      if (join_job()) {
        take_tasks(thread);
        leave_job();
      }
    }
  }

  std::vector<std::thread> workers_;
  std::unique_ptr<Range[]> ranges_ = std::make_unique<Range[]>(1);
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t, int) = nullptr;
  std::atomic<Errand*> posted_{nullptr};
  // The errand that a worker runs, or null. Its owner helps with the worker's thread number: in the errand's jobs the
  // worker itself is thread 0.
  const Errand* led_ = nullptr;
  int leader_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<bool> waiting_{false};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<uint32_t> door_{0};
};

}  // namespace moe
