// Runs a traced model's step: a list of operations over fixed buffers, by a team of threads.
//
// Row operations (segments, preparations of activations, writes to the cache) are cut by tokens, and a thread takes a
// piece through all that follow each other; products are cut by columns, and by rows where there are many; attention by
// items. Threads wait for each other in between. One parallel region holds the whole step, on the threads that torch
// uses, too.
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <vector>

#include "attention.h"
#include "gemm.h"

namespace lm {

enum Code : int32_t { SEGMENT = 0, PREPARE = 1, PRODUCT = 2, WRITE_CACHE = 3, ATTEND = 4, SELECT = 5 };

using SegmentFunction = void (*)(void* const* pointers, long begin, long end);

struct Operation {
  int32_t code;
  int32_t kept;     // over the rows whose logits are wanted, not over all tokens
  int32_t barrier;  // wait for all threads before it
  int32_t joined;   // goes over the same rows as the one before it, by rows as that one does
  int32_t type;     // of a product's activations and results
  SegmentFunction segment;
  void* const* pointers;
  const Weight* weight;
  void* scratch;
  Matrix in, out, keys, values;  // pitches in bytes
  const Attention* attention;
  int64_t bytes;  // of a row that is selected
};

struct Step {
  int32_t num_tokens, num_kept, num_spans, num_work;
  const int64_t *slots, *kept;
  const Span* spans;
  const int32_t* tables;
  const Work* work;  // attention's items, the same for every layer but for their head
  int64_t* nanoseconds;  // of each operation, with the wait before it, as the first thread sees it; or null
};

constexpr int SPINS = 300;  // some 20 microseconds
constexpr int PIECES = 8;   // of an operation for each thread
constexpr long MOST_ROWS = 128;  // of a product's piece

class Barrier {
 public:
  void set_size(int size) { size_ = size; }
  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // A thread that the system has put aside is waited for without burning its processor.
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < SPINS)
        __builtin_ia32_pause();
      else
        sched_yield();
    }
  }

 private:
  int size_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// Rows [begin, end) of an operation that goes by rows.
static void run_rows(const Operation& op, const Step& step, long begin, long end) {
  switch (op.code) {
    case SEGMENT: op.segment(op.pointers, begin, end); break;
    case PREPARE:
      prepare(*op.weight, op.in.data, op.type, op.in.pitch / (op.type == T_BF16 ? 2 : 4), begin, end, op.scratch);
      break;
    case WRITE_CACHE: write_cache(*op.attention, op.keys, op.values, step.slots, begin, end); break;
    default:
      for (long row = begin; row < end; ++row)
        std::memcpy(op.out.data + row * op.out.pitch, op.in.data + step.kept[row] * op.in.pitch, op.bytes);
  }
}

// Rows [begin, end) of panels [first, last) of a product.
static void run_panels(const Operation& op, long begin, long end, long first, long last) {
  const int size = op.type == T_BF16 ? 2 : 4;
  const char* scratch = static_cast<const char*>(op.scratch);
  product(*op.weight, op.in.data + begin * op.in.pitch, op.in.pitch / size,
          scratch + begin * prepared_bytes(*op.weight), int(end - begin), op.out.data + begin * op.out.pitch, op.type,
          op.out.pitch / size, first, last);
}

// Takes pieces of the `count` operations from `op` on until none is left. Who comes first is served first: cores are not
// equally fast, least of all where others use them, too. All go by rows if there are several.
static void run(const Operation* op, int count, const Step& step, int threads, std::atomic<int>& next,
                std::vector<float>& scratch) {
  const auto take = [&next] { return long(next.fetch_add(1, std::memory_order_relaxed)); };
  const long rows = op->kept ? step.num_kept : step.num_tokens;
  if (op->code == ATTEND) {
    const long heads = op->attention->kv_heads, total = step.num_work * heads;
    const auto item = [&](long i) {
      Work work = step.work[i / heads];
      work.kv_head = int(i % heads);
      return work;
    };
    const bool may_look_ahead = total > 2 * threads;
    for (long i = take(), next; i < total; i = next) {
      const Work work = item(i);
      // Taken early only where there are many short ones.
      const bool looks_ahead = may_look_ahead && step.spans[work.span].length == 1;
      next = looks_ahead ? take() : total;
      const Work following = item(std::min(next, total - 1));
      attend(*op->attention, step.spans, step.tables, work, next < total ? &following : nullptr, op->in, op->out, scratch);
      if (!looks_ahead) next = take();
    }
  } else if (op->code == PRODUCT) {
    const long panels = num_panels(*op->weight), blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const long size = std::clamp(panels * blocks / (PIECES * threads), 1L, long(PANELS_TOGETHER));
    const long pieces = (panels + size - 1) / size;
    for (long i; (i = take()) < pieces * blocks;) {
      const long begin = i % blocks * MOST_ROWS, first = i / blocks * size;
      run_panels(*op, begin, std::min(rows, begin + MOST_ROWS), first, std::min(panels, first + size));
    }
  } else {
    const long size = std::clamp(rows / (PIECES * threads), 1L, 16L);
    for (long begin; (begin = take() * size) < rows;)
      for (int i = 0; i < count; ++i) run_rows(op[i], step, begin, std::min(rows, begin + size));
  }
}

}  // namespace lm

extern "C" {

int lm_query_block() { return lm::QUERY_BLOCK; }

void lm_run(const lm::Operation* operations, int count, const lm::Step* step, int threads) {
  std::vector<std::atomic<int>> next(count);
  for (auto& counter : next) counter.store(0, std::memory_order_relaxed);
  lm::Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    static_assert(sizeof(lm::Span) == 16 && sizeof(lm::Work) == 16);
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#pragma omp single
    barrier.set_size(team);  // the system may have given fewer threads
    std::vector<float> scratch;
    const bool measures = step->nanoseconds && thread == 0;
    auto before = std::chrono::steady_clock::now();
    for (int i = 0, end; i < count; i = end) {
      if (operations[i].barrier) barrier.wait();
      for (end = i + 1; end < count && operations[end].joined;) ++end;
      lm::run(operations + i, end - i, *step, team, next[i], scratch);
      if (measures) {
        const auto now = std::chrono::steady_clock::now();
        step->nanoseconds[i] = std::chrono::nanoseconds(now - before).count();
        before = now;
      }
    }
  }
}

}  // extern "C"
