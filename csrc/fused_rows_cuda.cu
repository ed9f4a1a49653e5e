// The fused row kernel: it reads a row of logits once, and overwrites it with numbers that depend on the
// whole row. Triton cannot reach its speed, because a row stays in registers while the next row arrives.
//
// A row, or the slice of a row that a block of a cluster takes, lies in the registers of the block from the
// read to the write. Blocks are persistent. Meanwhile a bulk copy brings the block's next row into shared
// memory. There are two exchanges between the warps of a row, each with one barrier:
//
//   1  the two largest entries without the target's, and the target's   -> the reference of the exponentials
//   2  the sum of exponentials, the lowest index of the largest entry    -> everything else
//
// In a cluster a warp sends its part of an exchange to all blocks by st.async. Its bytes complete a phase of
// an mbarrier of the receiver. So the loop has no cluster barrier, which would wait for the stores to global
// memory. All threads compute the few numbers of a row. So none waits for one that computes alone.
//
// Let `second` be the second largest entry, and e(x) = exp(x - second) times a power of two near 1. The sum
// of the rest is the sum of e(min(x, second)) over all entries but the target, less one e(second). So the
// term of the largest entry is a number that is known exactly, however much that entry leads.
//
// The e(x) replace the entries in registers, in the dtype of the row. So an exponential is computed once. A
// result of 16 bits is rounded twice, and is off by at most one ulp.
#include "fused_rows_cuda.h"

#include "row_terms_cuda.h"

namespace loku {
namespace {

enum Ending { kInvertedHinge, kRestProbabilities, kCappedRestProbabilities };

constexpr int kMostThreads = 512;  // of a block, whose registers they fill: 128 each
constexpr int kMostBlocks = 8;     // of a cluster, on every device that has clusters
constexpr int kBulkBytes = 16384;  // of one bulk copy

struct Task {
  RowLayout logits;
  int rows, columns;
  const int64_t* labels;
  int64_t ignore_index;
  const double* scale;  // of kInvertedHinge alone
  double softcap;       // 1 without one
  float unit;           // log2(e) * softcap
  Triplets out;
  int log2_cluster;
  int stash_offset;  // where the next row lies in shared memory
};

// The parts of the exchanges that a warp sends to all warps of the row.
struct alignas(16) Message {
  float first, second;  // exchange 1, 16 bytes
  uint32_t target;      // the bits of the target's entry; 0 from warps that do not hold it
  uint32_t unused;
  float sum;  // exchange 2, 8 bytes
  int runner_up_id;
  uint32_t unused_too[2];
};

struct Barriers {
  uint64_t full;         // the next row has arrived
  uint64_t exchange[2];  // all messages have arrived; used in clusters alone
  uint64_t unused;
};

// --- the kernel -----------------------------------------------------------------------------------

// Overwrite rows with an ending, and write their triplets. A cluster takes every `step`-th row.
template <typename Word, Ending kEnding, bool kCluster>
__global__ void __launch_bounds__(kMostThreads, 1) fused_rows_kernel(LOKU_KERNEL_PARAMETER Task task) {
  using S = Slice<Word>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int warps = static_cast<int>(blockDim.x) >> 5;
  const int own = warp * (32 * kVectors) + lane;  // the thread's first vector
  const int log2_cluster = kCluster ? task.log2_cluster : 0;
  const int cluster = 1 << log2_cluster;
  const int rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const int step = static_cast<int>(gridDim.x) >> log2_cluster;
  const int senders = warps << log2_cluster;
  unsigned char* const memory = dynamic_shared();
  Barriers* const barriers = reinterpret_cast<Barriers*>(memory);
  Message* const messages = reinterpret_cast<Message*>(barriers + 1);
  Message* const own_message = messages + rank * warps + warp;
  Vector* const stash = reinterpret_cast<Vector*>(memory + task.stash_offset);
  const float scale = kEnding == kInvertedHinge ? static_cast<float>(*task.scale) : 0.0f;
  const auto announce = [&](int i) {
    mbarrier_arrive(barriers->exchange + i, static_cast<uint32_t>(senders) * (i == 0 ? 16 : 8));
  };

  if (thread == 0) {
    mbarrier_init(&barriers->full);
    for (int i = 0; i < 2; ++i) mbarrier_init(barriers->exchange + i);
    mbarrier_fence_init();
    if (kCluster) {
      for (int i = 0; i < 2; ++i) announce(i);
    }
  }
  if (kCluster) {
    cluster_barrier();  // from here the shared memory of all blocks can be reached
  } else {
    __syncthreads();
  }
  // Lane i tells block i.
  const Remote remote_message = kCluster ? remote_address(own_message, lane & (cluster - 1)) : Remote();
  const Remote remote_barriers =
      kCluster ? remote_address(barriers->exchange, lane & (cluster - 1)) : Remote();
  int exchanges = 0;  // pairs of them so far
  // Wait for the end of exchange i. The next of its kind is announced before this warp sends its message of
  // the other kind. So it is announced before another block can send a message that belongs to it.
  const auto await_messages = [&](int i) {
    if (kCluster) {
      mbarrier_wait(barriers->exchange + i, exchanges & 1);
      if (thread == 0) announce(i);
    } else {
      __syncthreads();
    }
  };

  // The labels of 32 of the cluster's rows, one a lane. Those of the next 32 are under way.
  int n = static_cast<int>(blockIdx.x) >> log2_cluster;
  const auto label_of = [&, first = n](int k) {
    const int64_t n = first + static_cast<int64_t>(k) * step;
    return n < task.rows ? task.labels[n] : task.ignore_index;
  };
  int batch = -1;
  int64_t next_batch = label_of(lane);
  // Return the target of the cluster's row k, for k = 0, 1, 2, ... It is -1 if the row is ignored or there is
  // none. All labels are checked together, because an error in divergent code would cost registers.
  const auto take_target = [&](int k) {
    if (k % 32 == 0) {
      const bool ignored = next_batch == task.ignore_index;
      if (warp_ballot(!ignored && (next_batch < 0 || next_batch >= task.columns))) fail();
      batch = ignored ? -1 : static_cast<int>(next_batch);
      next_batch = label_of(k + 32 + lane);
    }
    return warp_max(lane == k % 32 ? batch : -1);  // a reduction is uniform to the compiler, a shuffle is not
  };

  // Thread 0 starts the copy of a row to shared memory.
  const auto begin_load = [&](int n, int target) {
    if (thread != 0) return;
    uint32_t bytes = 0;
    const unsigned char* from = nullptr;
    if (target >= 0) {
      const S s(task.logits.row(n), task.columns, log2_cluster, rank);
      bytes = static_cast<uint32_t>(s.count) * 16;
      from = s.data();
    }
    mbarrier_arrive(&barriers->full, bytes);
#pragma unroll 1
    for (uint32_t done = 0; done < bytes; done += kBulkBytes) {
      copy_bulk(reinterpret_cast<unsigned char*>(stash) + done, from + done,
                min(bytes - done, static_cast<uint32_t>(kBulkBytes)), &barriers->full);
    }
  };

  int target = take_target(0);
  begin_load(n, target);
#pragma unroll 1
  for (int k = 0; n < task.rows; ++k, n += step) {
    const int next_target = take_target(k + 1);
    const S s(task.logits.row(n), task.columns, log2_cluster, rank);
    mbarrier_wait(&barriers->full, k & 1);
    Vector x[kVectors];
    if (target < 0) {
      __syncthreads();  // no thread waits for the copy any more, so the next one may begin
      begin_load(n + step, next_target);
      store_slice(s, task.columns, own, x, [](Vector& v) { v = filled(0); });
      if (rank == 0 && thread == 0) {
        double* const triplet = task.out.triplet + 3 * static_cast<int64_t>(n);
        triplet[0] = triplet[1] = triplet[2] = 0.0;
        task.out.runner_up_id[n] = -1;
      }
      target = next_target;
      continue;
    }
    if (s.warp_ends_before(own, s.count)) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) x[j] = stash[own + 32 * j];
    } else {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        x[j] = own + 32 * j < s.count ? stash[own + 32 * j] : filled(Word::kMinusInfinity);
      }
    }

    // Put -inf in the place of the target, and of entries outside the row.
    if (s.low > 0 && thread == 0) mask_edge<Word>(x[0], s.entry_of(0), task.columns);
    const int last = s.count - 1;
    if (s.high < s.count && s.holds(own, last)) {
      Vector v = pick(x, turn_of(last));
      mask_edge<Word>(v, s.entry_of(last), task.columns);
      put(x, turn_of(last), v);
    }
    uint32_t target_bits = 0;
    const bool has_target = s.holds(own, s.vector_of(target));
    if (has_target) {
      const int j = turn_of(s.vector_of(target));
      Vector v = pick(x, j);
      set_entry<Word>(v, s.place_of(target), Word::kMinusInfinity);
      put(x, j, v);
      target_bits = reinterpret_cast<const typename Word::Storage*>(stash)[target - s.first_entry];
    }

    // Exchange 1.
    uint32_t top = Word::kMinusInfinity, below = Word::kMinusInfinity;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        below = Word::max(below, Word::min(top, x[j].word[w]));
        top = Word::max(top, x[j].word[w]);
      }
    }
    float first = Word::low(top), second = Word::low(below);
    if (S::kPerWord == 2) merge_largest(first, second, Word::high(top), Word::high(below));
    const float own_first = first;
    if (kCluster) fence_messages();
    merge_largest_of_warp(first, second);
    target_bits = warp_or(target_bits);
    if (lane < cluster) {
      const Vector message = {{as_bits(first), as_bits(second), target_bits, 0}};
      if (kCluster) {
        send_16_bytes(remote_message, remote_barriers, message);
      } else {
        *reinterpret_cast<Vector*>(own_message) = message;
      }
    }
    await_messages(0);
    begin_load(n + step, next_target);  // all threads of the block have read this row

    first = second = -HUGE_VALF;
    target_bits = 0;
#pragma unroll 1
    for (int i = lane; i < senders; i += 32) {
      const Vector message = *reinterpret_cast<const Vector*>(messages + i);
      merge_largest(first, second, as_float(message.word[0]), as_float(message.word[1]));
      target_bits |= message.word[2];
    }
    merge_largest_of_warp(first, second);
    const float target_entry = Word::low(warp_or(target_bits));
    int runner_up_id = INT_MAX;
    if (own_first == first && first > -HUGE_VALF) runner_up_id = lowest_index(x, first, s, own);
    if (own_first > second) {                             // one thread, or none
      const uint32_t limit = Word::pack(second, second);  // exact, because it is an entry
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
#pragma unroll
        for (int w = 0; w < 4; ++w) x[j].word[w] = Word::min_or_nan(x[j].word[w], limit);
      }
    }

    // Exchange 2.
    constexpr bool kCapped = kEnding == kCappedRestProbabilities;
    const float unit = kCapped ? task.unit : kUnit;
    const Reference r = reference_of<Word>(second, unit);
    float part, clamped;  // the sum of the thread, and e(second)
    if (r.masked) {
      const auto exponential = [&](float y) {  // nothing is subtracted from -inf
        return exp2_approximate(fmaf(unit, y - fmaxf(second, -FLT_MAX), r.shift));
      };
      part = replace_by_terms<Word, kCapped>(x, exponential);
      clamped = exponential(second);
    } else {
      const auto exponential = [&](float y) { return exp2_approximate(fmaf(y, unit, -r.offset)); };
      part = replace_by_terms<Word, kCapped>(x, exponential);
      clamped = exponential(second);
    }
    if (kCluster) fence_messages();
    part = warp_sum(part);
    runner_up_id = warp_min(runner_up_id);
    if (lane < cluster) {
      if (kCluster) {
        send_8_bytes(remote_message + 16, remote_barriers + 8, as_bits(part),
                     static_cast<uint32_t>(runner_up_id));
      } else {
        own_message->sum = part;
        own_message->runner_up_id = runner_up_id;
      }
    }
    await_messages(1);
    ++exchanges;
    float total = 0.0f;
    runner_up_id = INT_MAX;
#pragma unroll 1
    for (int i = lane; i < senders; i += 32) {
      total += messages[i].sum;
      runner_up_id = min(runner_up_id, messages[i].runner_up_id);
    }
    runner_up_id = warp_min(runner_up_id);
    if (runner_up_id == INT_MAX) runner_up_id = target == 0 ? 1 : 0;  // all others are -inf or NaN
    const float rest = warp_sum(total) - clamped;

    Results results;
    if (kEnding == kInvertedHinge) {
      results = inverted_hinge_gradient<S::kPerWord == 2>(target_entry, first, r, rest, scale);
    } else {
      results = rest_probabilities(rest);
    }
    store_slice(s, task.columns, own, x, [&](Vector& v) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        v.word[w] = Word::pack(Word::low(v.word[w]) * results.factor, Word::high(v.word[w]) * results.factor);
      }
    });
    // The same thread has stored the vectors around these two.
    if (has_target) store_entry<Word>(s.row, target, results.target);
    if (s.holds(own, s.vector_of(runner_up_id))) store_entry<Word>(s.row, runner_up_id, results.runner_up);
    if (rank == 0 && warp == warps - 1 && lane == 0) {  // another warp than the one with the loads
      double* const triplet = task.out.triplet + 3 * static_cast<int64_t>(n);
      triplet[0] = task.softcap * target_entry;
      triplet[1] = task.softcap * first;
      triplet[2] = rest == 0.0f ? -static_cast<double>(HUGE_VALF)
                                : task.softcap * second - kLn2 * r.shift + log(static_cast<double>(rest));
      task.out.runner_up_id[n] = runner_up_id;
    }
    target = next_target;
  }
}

// --- launchers ------------------------------------------------------------------------------------

int ceil_divide(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int header_bytes(int threads, int cluster) {
  const int bytes =
      static_cast<int>(sizeof(Barriers)) + threads / 32 * cluster * static_cast<int>(sizeof(Message));
  return ceil_divide(bytes, 128) * 128;
}

// Choose blocks for rows of so many vectors. Small blocks come first, because several on a multiprocessor
// overlap the arithmetic of one with the copies of another. A prototype of the kernel was measured on an
// H200, for bfloat16. For 2048 rows of 32000 logits, blocks of 128 threads took 1.13 times as long as a copy,
// and blocks of 256 threads 1.18 times. Rows of 50257 logits are not aligned to 16 bytes. They were measured
// in blocks of 256 threads, with 1.24 times.
LaunchShape choose_shape(int64_t vectors, bool aligned, int shared_bytes) {
  for (int threads = aligned ? 128 : 256; threads <= kMostThreads; threads *= 2) {
    for (int cluster = 1; cluster <= kMostBlocks; cluster *= 2) {
      const int share = ceil_divide(vectors, cluster);
      if (share > threads * kVectors) continue;
      const int needed = ceil_divide(share, 32 * kVectors) * 32;
      const LaunchShape shape = {cluster, needed, header_bytes(needed, cluster) + share * 16};
      if (shape.shared_bytes <= shared_bytes) return shape;
    }
  }
  return {0, 0, 0};
}

template <typename Word, Ending kEnding>
void launch_fused(const char* name, const DeviceRows& rows, Task task, Stream stream) {
  constexpr int kSize = Slice<Word>::kSize, kWidth = Slice<Word>::kWidth;
  if (rows.count == 0) return;
  task.logits = {static_cast<unsigned char*>(rows.data), static_cast<unsigned>(rows.inner),
                 rows.outer_stride * kSize, rows.inner_stride * kSize};
  const bool aligned =
      (reinterpret_cast<uintptr_t>(rows.data) | static_cast<uintptr_t>(task.logits.outer_bytes) |
       static_cast<uintptr_t>(task.logits.inner_bytes)) %
          16 ==
      0;
  const int64_t vectors = (rows.columns + (aligned ? 0 : kWidth - 1) + kWidth - 1) / kWidth;
  use_device(stream.device);
  const LaunchShape shape = choose_shape(vectors, aligned, shared_per_block(stream.device));
  if (shape.cluster == 0 || rows.columns < 2 || rows.count > 1 << 30) {
    throw std::invalid_argument(std::string("loku_kernels, ") + name + ": no kernel for " +
                                std::to_string(rows.count) + " rows of " + std::to_string(rows.columns) +
                                " logits on this device");
  }
  task.rows = static_cast<int>(rows.count);
  task.columns = static_cast<int>(rows.columns);
  while (1 << task.log2_cluster < shape.cluster) ++task.log2_cluster;
  task.stash_offset = header_bytes(shape.threads, shape.cluster);
  const auto kernel =
      shape.cluster > 1 ? &fused_rows_kernel<Word, kEnding, true> : &fused_rows_kernel<Word, kEnding, false>;
  const int resident = resident_clusters(name, kernel, shape, stream.device);
  launch(name, kernel, shape, min(resident, task.rows), stream.handle, task);
}

template <Ending kEnding>
void launch_for_type(const char* name, const DeviceRows& rows, const Task& task, Stream stream) {
  for_type_of<Float32Word, BFloat16Word, Float16Word>(
      rows.dtype, [&](auto word) { launch_fused<decltype(word), kEnding>(name, rows, task, stream); });
}

Task task_of(const int64_t* labels, int64_t ignore_index, const double* scale, double softcap,
             const Triplets& out) {
  Task task = {};
  task.labels = labels;
  task.ignore_index = ignore_index;
  task.scale = scale;
  task.softcap = softcap == 0.0 ? 1.0 : softcap;
  task.unit = static_cast<float>(kLog2E * task.softcap);
  task.out = out;
  return task;
}

}  // namespace

// Return the reason why the kernels cannot run on this machine: no driver, too old a driver, no device. It is
// empty if they can.
std::string cuda_error() { return device_error(); }

// Return the bytes of the longest row that the kernels take on a device, if the row is aligned to 16 bytes.
// Another row may have 16 bytes less, less an entry. The result is 0 if the device cannot run the kernels.
int64_t cuda_longest_row(int device) {
  const int shared_bytes = shared_per_block(device);
  int64_t longest = 0;
  for (int threads = 32; threads <= kMostThreads; threads += 32) {
    const int vectors = min((shared_bytes - header_bytes(threads, kMostBlocks)) / 16, threads * kVectors);
    longest = max(longest, int64_t{kMostBlocks} * 16 * vectors);
  }
  return longest;
}

// Overwrite the logits with *scale, a number on the device, times the gradient of IHL.
void cuda_inverted_hinge_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const double* scale, const Triplets& out, Stream stream) {
  launch_for_type<kInvertedHinge>("inverted_hinge_", logits, task_of(labels, ignore_index, scale, 0.0, out),
                                  stream);
}

// Overwrite the logits with exp(y - rest), and with 0 at target and runner-up and where rest is -inf. With a
// softcap > 0 an entry is u, it stands for y = softcap * u, and the results are multiplied by the slope 1 -
// u^2.
void cuda_rest_probabilities_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                              double softcap, const Triplets& out, Stream stream) {
  const Task task = task_of(labels, ignore_index, nullptr, softcap, out);
  if (softcap == 0.0) {
    launch_for_type<kRestProbabilities>("rest_probabilities_", logits, task, stream);
  } else {
    launch_for_type<kCappedRestProbabilities>("rest_probabilities_", logits, task, stream);
  }
}

}  // namespace loku
