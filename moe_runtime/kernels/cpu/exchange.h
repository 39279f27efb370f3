// Sends token rows to the experts of this host's other ranks, and returns the results, through shared memory.
//
// Every rank has a segment, which all ranks map. Exchanges are numbered, and all ranks make the same ones in the same
// order. In exchange n, a rank writes its data into its peers' segments, then sets its flag there to n, and waits for
// the flags of all peers. There are no acknowledgements: exchange n + 2 may overwrite the data of exchange n. A rank
// starts n + 2 only after it has seen flag n + 1 of every peer, which a peer sets after it has consumed n.
//
// A dispatch is one exchange, and so is its combine. Each direction has its own area in the segment. If an area can't
// hold all tokens, each takes several exchanges, called dispatch rounds, which alternate between the area's two halves.
#pragma once

#include <sched.h>

#include <ctime>

#include "moe.h"

namespace moe {

// After spinning, a rank polls for another `kYield`, yielding its core between polls, because waking from sleep can
// cost as much as the wait. Then it sleeps.
constexpr auto kYield = std::chrono::microseconds(300);

// Filled by the caller; only `rank` differs between ranks. `capacity` is the tokens of a rank in one exchange; even.
struct ExchangeShape {
  int64_t ranks;
  int64_t rank;
  int64_t slots;  // per rank
  int64_t hidden;
  int64_t top_k;
  int64_t capacity;
  int64_t row_bytes;
  int64_t ranks_share_cores;  // there are more ranks than cores
};

class Exchange {
 public:
  Exchange(const ExchangeShape& shape, char* const* segments)
      : shape_(shape), segments_(segments, segments + shape.ranks), rows_(shape.ranks), newest_(shape.ranks) {}

  static int64_t segment_bytes(const ExchangeShape& shape) {
    return returned_offset(shape) + shape.capacity * shape.top_k * shape.row_bytes;
  }

  int64_t slots() const { return shape_.slots; }

  // Writes each token once into the segment of every rank that has one of its slots (`slot[tokens, top_k]`, global, -1
  // for none). Then reads what the peers wrote here. `received` gets the rows. `row` gets the received row of each
  // computation, grouped by slot; `counts` gets the computations of each slot. `most_tokens` is the largest number of
  // tokens of any rank. Each rank passes a number, `own`, and gets the largest of all ranks in `largest`.
  // Returns the number of computations, or -1 - r if rank r did not arrive in time.
  int64_t dispatch(Engine& engine, const char* x, const int64_t* slot, int64_t tokens, int64_t most_tokens, int64_t own,
                   int64_t timeout_ns, char* received, int64_t* row, int64_t* counts, int64_t* largest) {
    tokens_ = tokens;
    *largest = own;
    round_tokens_ = most_tokens <= shape_.capacity ? shape_.capacity : shape_.capacity / 2;
    rounds_ = ceil_div(most_tokens, round_tokens_);
    place_.resize(tokens * shape_.top_k);
    pairs_.clear();
    slots_.clear();
    round_end_.clear();
    int64_t num_received = 0;
    for (int64_t round = 0; round < rounds_; round++) {
      number_++;
      put_tokens(engine.pool, x, slot, round);
      for (int64_t owner = 0; owner < shape_.ranks; owner++) flag(owner, shape_.rank).brought[number_ % 2] = own;
      set_flags();
      const int64_t late = wait(timeout_ns);
      if (late >= 0) return -1 - late;
      num_received = take_tokens(engine.pool, x, round, num_received, received);
      for (int64_t source = 0; source < shape_.ranks; source++) {
        *largest = std::max(*largest, flag(shape_.rank, source).brought[number_ % 2]);
      }
    }
    const int64_t total = pairs_.size();
    order_.resize(total);
    group_by_slot(slots_.data(), total, shape_.slots, order_.data(), counts);
    for (int64_t i = 0; i < total; i++) {
      row[i] = pairs_[order_[i]].row;
      pairs_[order_[i]].computation = i;
    }
    return total;
  }

  // The return path of the last dispatch: `y` has its computations in order. `out[tokens, hidden]` is each token's sum
  // over k, in order, plus its row of `extra` unless null. Returns -1, or the rank that did not arrive in time.
  template <class T>
  int64_t combine(Engine& engine, const T* y, const float* weights, const T* extra, int64_t timeout_ns, T* out) {
    const int64_t top_k = shape_.top_k;
    return return_path(engine.pool, reinterpret_cast<const char*>(y), timeout_ns,
                       [&](int64_t first, int64_t count, const char* rows) {
                         moe::combine(engine, reinterpret_cast<const T*>(rows), place_.data() + first * top_k,
                                      weights + first * top_k, count, top_k, shape_.hidden,
                                      extra ? extra + first * shape_.hidden : nullptr, out + first * shape_.hidden);
                       });
  }

  // The same return path without the sum: the row of each (token, k) goes to its place in `out[tokens, top_k, hidden]`.
  // A (token, k) without a slot is not written.
  int64_t bring_back(Engine& engine, const char* y, int64_t timeout_ns, char* out) {
    const int64_t top_k = shape_.top_k;
    return return_path(engine.pool, y, timeout_ns, [&](int64_t first, int64_t count, const char* rows) {
      copies_.clear();
      for (int64_t pair = first * top_k; pair < (first + count) * top_k; pair++) {
        if (place_[pair] < 0) continue;
        copies_.push_back({rows + place_[pair] * shape_.row_bytes, out + pair * shape_.row_bytes});
      }
      copy_rows(engine.pool);
    });
  }

 private:
  // The futex that a rank sleeps on.
  struct alignas(64) Bell {
    std::atomic<uint32_t> rings;
    std::atomic<uint32_t> sleeping;
  };

  // From one peer. Its row count and its `own` number are stored twice: for even and for odd exchanges.
  struct alignas(64) Flag {
    std::atomic<uint64_t> number;
    int64_t rows[2];
    int64_t brought[2];
  };

  // A (token, k) computed here: its source rank, where its result goes, its received row, and its computation.
  struct Pair {
    int64_t source, position, row, computation;
  };

  struct Copy {
    const char* from;
    char* to;
  };

  // A segment: bell; flag of each rank; rows [ranks, capacity]; token and local slots of each row, int32
  // [ranks, capacity, 1 + top_k]; returned rows [capacity, top_k].
  static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
  static int64_t rows_offset(const ExchangeShape& shape) { return sizeof(Bell) + shape.ranks * sizeof(Flag); }
  static int64_t entries_offset(const ExchangeShape& shape) {
    return rows_offset(shape) + aligned(shape.ranks * shape.capacity * shape.row_bytes);
  }
  static int64_t returned_offset(const ExchangeShape& shape) {
    return entries_offset(shape) + aligned(shape.ranks * shape.capacity * (1 + shape.top_k) * sizeof(int32_t));
  }

  Bell& bell(int64_t owner) { return *reinterpret_cast<Bell*>(segments_[owner]); }
  Flag& flag(int64_t owner, int64_t source) {
    return reinterpret_cast<Flag*>(segments_[owner] + sizeof(Bell))[source];
  }
  char* row(int64_t owner, int64_t source, int64_t index) {
    return segments_[owner] + rows_offset(shape_) + (source * shape_.capacity + index) * shape_.row_bytes;
  }
  int32_t* entry_of(int64_t owner, int64_t source, int64_t index) {
    return reinterpret_cast<int32_t*>(segments_[owner] + entries_offset(shape_)) +
           (source * shape_.capacity + index) * (1 + shape_.top_k);
  }
  char* returned(int64_t owner, int64_t index) {
    return segments_[owner] + returned_offset(shape_) + index * shape_.row_bytes;
  }

  int64_t tokens_of(int64_t round) const {
    return std::clamp<int64_t>(tokens_ - round * round_tokens_, 0, round_tokens_);
  }

  // Returns the rows of `y`; calls `take` with the first token, the tokens and the rows of each dispatch round.
  template <class Take>
  int64_t return_path(Pool& pool, const char* y, int64_t timeout_ns, const Take& take) {
    for (int64_t round = 0; round < rounds_; round++) {
      number_++;
      const int64_t half = round % 2 * round_tokens_ * shape_.top_k;
      copies_.clear();
      for (int64_t i = round ? round_end_[round - 1] : 0; i < round_end_[round]; i++) {
        const Pair& pair = pairs_[i];
        copies_.push_back({y + pair.computation * shape_.row_bytes, returned(pair.source, half + pair.position)});
      }
      copy_rows(pool);
      set_flags();
      const int64_t late = wait(timeout_ns);
      if (late >= 0) return late;
      take(round * round_tokens_, tokens_of(round), returned(shape_.rank, half));
    }
    return -1;
  }

  // A rank's own rows are not copied.
  void put_tokens(Pool& pool, const char* x, const int64_t* slot, int64_t round) {
    const int64_t first = round * round_tokens_, half = round % 2 * round_tokens_, top_k = shape_.top_k;
    copies_.clear();
    std::fill(rows_.begin(), rows_.end(), 0);
    std::fill(newest_.begin(), newest_.end(), -1);
    for (int64_t token = 0; token < tokens_of(round); token++) {
      for (int64_t k = 0; k < top_k; k++) {
        const int64_t pair = (first + token) * top_k + k, wanted = slot[pair];
        place_[pair] = wanted < 0 ? -1 : token * top_k + k;
        if (wanted < 0) continue;
        const int64_t owner = wanted / shape_.slots;
        if (newest_[owner] != token) {
          newest_[owner] = token;
          const int64_t index = half + rows_[owner]++;
          int32_t* entry = entry_of(owner, shape_.rank, index);
          entry[0] = static_cast<int32_t>(token);
          std::fill_n(entry + 1, top_k, -1);
          if (owner != shape_.rank) {
            copies_.push_back({x + (first + token) * shape_.row_bytes, row(owner, shape_.rank, index)});
          }
        }
        entry_of(owner, shape_.rank, half + rows_[owner] - 1)[1 + k] = static_cast<int32_t>(wanted % shape_.slots);
      }
    }
    copy_rows(pool);
    for (int64_t owner = 0; owner < shape_.ranks; owner++) flag(owner, shape_.rank).rows[number_ % 2] = rows_[owner];
  }

  // Returns the number of received rows so far.
  int64_t take_tokens(Pool& pool, const char* x, int64_t round, int64_t num_received, char* received) {
    const int64_t first = round * round_tokens_, half = round % 2 * round_tokens_, top_k = shape_.top_k;
    copies_.clear();
    for (int64_t source = 0; source < shape_.ranks; source++) {
      const int64_t count = flag(shape_.rank, source).rows[number_ % 2];
      for (int64_t i = 0; i < count; i++, num_received++) {
        const int32_t* entry = entry_of(shape_.rank, source, half + i);
        const int64_t token = entry[0];
        const bool own = source == shape_.rank;
        copies_.push_back({own ? x + (first + token) * shape_.row_bytes : row(shape_.rank, source, half + i),
                           received + num_received * shape_.row_bytes});
        for (int64_t k = 0; k < top_k; k++) {
          if (entry[1 + k] < 0) continue;
          pairs_.push_back({source, token * top_k + k, num_received, 0});
          slots_.push_back(entry[1 + k]);
        }
      }
    }
    copy_rows(pool);
    round_end_.push_back(pairs_.size());
    return num_received;
  }

  void copy_rows(Pool& pool) {
    constexpr int64_t kRows = 16;
    const int64_t count = copies_.size();
    pool.run(ceil_div(count, kRows), [&](int64_t task, int) {
      for (int64_t i = task * kRows; i < std::min(count, (task + 1) * kRows); i++) {
        std::memcpy(copies_[i].to, copies_[i].from, shape_.row_bytes);
      }
    });
  }

  void set_flags() {
    for (int64_t owner = 0; owner < shape_.ranks; owner++) {
      flag(owner, shape_.rank).number.store(number_, std::memory_order_release);
    }
    // With this fence, either this rank sees that a peer sleeps, or that peer sees the flag before it sleeps.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (int64_t owner = 0; owner < shape_.ranks; owner++) {
      if (owner == shape_.rank || !bell(owner).sleeping.load(std::memory_order_relaxed)) continue;
      bell(owner).rings.fetch_add(1);
      syscall(SYS_futex, &bell(owner).rings, FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }
  }

  // The first rank whose flag is missing, or -1.
  int64_t missing() {
    for (int64_t source = 0; source < shape_.ranks; source++) {
      if (flag(shape_.rank, source).number.load(std::memory_order_acquire) < number_) return source;
    }
    return -1;
  }

  // Waits for all flags; returns -1, or a rank that did not arrive in time.
  int64_t wait(int64_t timeout_ns) {
    const auto arrived = [this] { return missing() < 0; };
    const auto arrived_meanwhile = [this] {  // yields the core: a peer or the front may need it
      if (missing() < 0) return true;
      sched_yield();
      return false;
    };
    if (!shape_.ranks_share_cores && spin_until(arrived)) return -1;
    if (spin_until(arrived_meanwhile, shape_.ranks_share_cores ? kSpin : kYield)) return -1;
    using Clock = std::chrono::steady_clock;
    const auto deadline = Clock::now() + std::chrono::nanoseconds(timeout_ns);
    Bell& mine = bell(shape_.rank);
    mine.sleeping.store(1);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    int64_t late;
    while (true) {
      const uint32_t seen = mine.rings.load(std::memory_order_acquire);
      late = missing();
      const int64_t left = std::chrono::nanoseconds(deadline - Clock::now()).count();
      if (late < 0 || left <= 0) break;
      const timespec limit{left / 1000000000, left % 1000000000};
      syscall(SYS_futex, &mine.rings, FUTEX_WAIT, seen, &limit, nullptr, 0);
    }
    mine.sleeping.store(0);
    return late;
  }

  const ExchangeShape shape_;
  const std::vector<char*> segments_;
  uint64_t number_ = 0;
  std::vector<Copy> copies_;
  std::vector<int64_t> rows_, newest_;  // of each rank: rows written there, and the last token that has one

  // Of the last dispatch; pairs in the order of arrival.
  int64_t tokens_ = 0, round_tokens_ = 1, rounds_ = 0;
  std::vector<int64_t> place_, round_end_, slots_, order_;
  std::vector<Pair> pairs_;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

}  // namespace moe
