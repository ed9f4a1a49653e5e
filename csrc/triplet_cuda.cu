// Softmax triplet, CUDA kernels: forward, backward, the fused in-place forward and backward, the columns of
// the linear operator, and the scaling of rows.
//
// A row belongs to a block, or to a cluster of blocks that take a slice each. reduce_row() (reduction_cuda.h)
// reads a row once and returns its three numbers. write_gradient() reads the row again and writes the
// gradient. The second read is from shared memory in the fused kernels that keep the row there.
//
// Exponentials are powers of two, 2^(unit * (x - reference)). The unit is log2(e), times the softcap if there
// is one. The reference is an entry. A fused multiply-add, unit * x - unit * reference, would save an
// instruction, but the last product is rounded. Beyond 1e9 this error exceeds the range of an exponent, and
// masks of -1e10 and lower are in use.
//
// Beside each kernel are its floors: the bytes that it must move, and the instructions that nvcc makes of its
// loop for bfloat16. An H100 or H200 issues an eighth as many exponentials as other instructions. The
// measured times are from one H200, in benchmarks/results/gpu_h200.json. There a copy of 8192 x 128256
// bfloat16 logits takes 0.98 ms.
#include "triplet_cuda.h"

#include <cassert>
#include <climits>

#include "gpu.h"
#include "reduction_cuda.h"
#include "rows_cuda.h"

namespace loku {
namespace {

// Threads of a block. Four blocks of 256 threads, or two of 512, fill the registers of a multiprocessor and
// hide each other's latencies.
constexpr int kThreads = 256;
constexpr int kKeepingThreads = 512;    // most threads of the fused kernel with rows in shared memory
constexpr int kRereadingThreads = 768;  // threads of the fused kernel without them
constexpr int kMaxCluster = 8;          // the portable limit
constexpr double kLog2E = 1.4426950408889634;

// --- the gradient ---------------------------------------------------------------------------------

// The gradient of an entry x other than target and runner-up is g_rest * exp(y - rest). It is computed as
// factor * power(unit, x, reference). The reference is `rest` rounded to float, and the factor corrects the
// rounding. The rounding moves the reference no farther than to the largest term of the rest, because the
// entries are floats too.
struct RowGradient {
  float target, runner_up, factor, reference;
};

__device__ __forceinline__ RowGradient row_gradient(double g_target, double g_runner_up, double g_rest,
                                                    double rest, double factor, float unit) {
  RowGradient g = {static_cast<float>(g_target), static_cast<float>(g_runner_up), 0.0f, 0.0f};
  if (rest == -kDoubleInfinity) return g;
  const double exact = rest / factor;
  g.reference = static_cast<float>(exact);
  g.factor = static_cast<float>(g_rest) * exp2_approximate(unit * static_cast<float>(g.reference - exact));
  return g;
}

__device__ __forceinline__ float slope(float x, bool softcap) { return softcap ? fmaf(-x, x, 1.0f) : 1.0f; }

template <bool kKept, typename Word>
__device__ __forceinline__ void write_gradient(const RowVectors<Word>& vectors, typename Word::Storage* out,
                                               const Vector* stash, const RowGradient& g, int target,
                                               int runner_up_id, float unit, bool softcap) {
  const uint32_t target_bits = Word::pack(g.target, g.target);
  const uint32_t runner_up_bits = Word::pack(g.runner_up, g.runner_up);
  write_row<kKept>(
      vectors, out, stash,
      [&](float x) { return g.factor * power(unit, x, g.reference) * slope(x, softcap); },
      [&](Vector& v, int i) {
        vectors.replace(v, i, target, target_bits);
        vectors.replace(v, i, runner_up_id, runner_up_bits);
      });
}

// Compute the gradient of IHL = 1 + p_0 - p_1 in the triplet, with p its softmax. Only sums of probabilities
// occur, so nothing cancels for p_0 near 1.
__device__ __forceinline__ void inverted_hinge_gradient(const double (&triplet)[3], double (&g)[3]) {
  const double top = fmax(triplet[0], fmax(triplet[1], triplet[2]));
  double p[3];
  for (int i = 0; i < 3; ++i) p[i] = exp(triplet[i] - top);
  const double sum = p[0] + p[1] + p[2];
  for (int i = 0; i < 3; ++i) p[i] /= sum;
  g[0] = p[0] * (2 * p[1] + p[2]);
  g[1] = -p[1] * (2 * p[0] + p[2]);
  g[2] = p[2] * (p[1] - p[0]);
}

// --- kernels --------------------------------------------------------------------------------------

__device__ __forceinline__ void write_triplet(const Triplets& out, unsigned n, double target,
                                              double runner_up, double rest, int64_t runner_up_id) {
  double* triplet = out.triplet + 3 * static_cast<int64_t>(n);
  triplet[0] = target;
  triplet[1] = runner_up;
  triplet[2] = rest;
  out.runner_up_id[n] = runner_up_id;
}

// Return entry `index` of a row, or 0 if the row has no such column.
template <typename Word>
__device__ __forceinline__ float entry_at(const RowVectors<Word>& vectors, int index) {
  return index >= 0 && index < vectors.columns ? Word::low(vectors.row[index]) : 0.0f;
}

// Return the index of a label of the whole vocabulary in columns that begin at `first_column`, or -1.
__device__ __forceinline__ int index_in(int64_t label, int64_t first_column, int columns) {
  return label >= first_column && label - first_column < columns ? static_cast<int>(label - first_column)
                                                                 : -1;
}

// Pass the results of one thread to all threads of the block. After the barrier that follows, no thread reads
// an entry that another one overwrites.
__device__ __forceinline__ void share_gradient(Shared* shared, const RowGradient& g, int runner_up) {
  shared->gradient[0] = g.target;
  shared->gradient[1] = g.runner_up;
  shared->gradient[2] = g.factor;
  shared->gradient[3] = g.reference;
  shared->runner_up = runner_up;
}

__device__ __forceinline__ RowGradient shared_gradient(const Shared* shared) {
  return {shared->gradient[0], shared->gradient[1], shared->gradient[2], shared->gradient[3]};
}

// Floors: one read of each logit, and 10 instructions a logit, one of them an exponential. Measured: 0.50 ms
// for 8192 x 128256 bfloat16.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    triplet_forward_kernel(RowLayout logits, int vocab, const int64_t* labels, int64_t ignore_index,
                           float unit, Triplets out) {
  const unsigned n = blockIdx.x;
  const int64_t label = labels[n];
  if (label == ignore_index) {
    if (threadIdx.x == 0) write_triplet(out, n, 0.0, 0.0, 0.0, -1);
    return;
  }
  assert(label >= 0 && label < vocab && "loku_kernels: a label is outside the vocabulary");
  const RowVectors<Word> vectors(logits.row<Word>(n), vocab, 1, 0);
  const int target = static_cast<int>(label);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  const Reduced reduced = reduce_row<false>(vectors, target, unit, 1, 0, shared, nullptr);
  if (threadIdx.x == 0) {
    write_triplet(out, n, entry_at(vectors, target), entry_at(vectors, reduced.runner_up_id),
                  log_of_rest(reduced, 1.0), reduced.runner_up_id);
  }
}

// Floors: one read and one write of each logit, and 8 instructions a logit, one of them an exponential.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    triplet_backward_kernel(RowLayout logits, int columns, int64_t first_column, const int64_t* labels,
                            int64_t ignore_index, double softcap, float unit, Triplets saved,
                            const double* grad_triplet, RowLayout grad_logits) {
  const unsigned n = blockIdx.x;
  const int64_t label = labels[n];
  const RowVectors<Word> vectors(logits.row<Word>(n), columns, 1, 0);
  typename Word::Storage* out = grad_logits.row<Word>(n);
  if (label == ignore_index) {
    write_zeros<Word>(vectors, out);
    return;
  }
  const int target = index_in(label, first_column, columns);
  const int runner_up = index_in(saved.runner_up_id[n], first_column, columns);
  const double* g = grad_triplet + 3 * static_cast<int64_t>(n);
  const bool capped = softcap != 0.0;
  RowGradient gradient = row_gradient(g[0], g[1], g[2], saved.triplet[3 * static_cast<int64_t>(n) + 2],
                                      capped ? softcap : 1.0, unit);
  gradient.target *= slope(entry_at(vectors, target), capped);
  gradient.runner_up *= slope(entry_at(vectors, runner_up), capped);
  __syncthreads();  // `out` may be the row, so both entries are read before any thread writes
  write_gradient<false>(vectors, out, nullptr, gradient, target, runner_up, unit, capped);
}

// Compute forward and backward of IHL in one, in place. `cluster` blocks share a row. With kKeep each holds
// its slice in shared memory, after the Shared. Without, it reads the row again. That read is from the L2
// cache if the rows in flight fit. Floors: one read and one write of each logit, and 18 instructions a logit,
// two of them exponentials. For bfloat16, rows of 128256 logits take clusters of 4 blocks with 66 KB each.
// Rows of 50257 take one block with 101 KB, and two blocks stay on a multiprocessor. Measured: 1.80 ms for
// the loss in place on 8192 x 128256, and 0.64 ms on 8192 x 50257.
template <typename Word, bool kKeep>
__global__ void __launch_bounds__(kKeep ? kKeepingThreads : kRereadingThreads, kKeep ? 2 : 1)
    inverted_hinge_kernel(RowLayout logits, int vocab, int cluster, const int64_t* labels,
                          int64_t ignore_index, float unit, const double* scale, Triplets out) {
  const unsigned n = blockIdx.x / static_cast<unsigned>(cluster);
  const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(cluster));
  const int64_t label = labels[n];
  const RowVectors<Word> vectors(logits.row<Word>(n), vocab, cluster, rank);
  if (label == ignore_index) {  // the same in all blocks of the cluster
    if (rank == 0 && threadIdx.x == 0) write_triplet(out, n, 0.0, 0.0, 0.0, -1);
    write_zeros<Word>(vectors, vectors.row);
    return;
  }
  assert(label >= 0 && label < vocab && "loku_kernels: a label is outside the vocabulary");
  const int target = static_cast<int>(label);
  // Read before any block of the cluster overwrites the entry. Two cluster barriers lie between.
  const float target_entry = entry_at(vectors, target);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  Vector* stash = reinterpret_cast<Vector*>(shared + 1);
  const Reduced reduced = reduce_row<kKeep>(vectors, target, unit, cluster, rank, shared, stash);
  if (threadIdx.x == 0) {
    const double triplet[3] = {target_entry, reduced.first, log_of_rest(reduced, 1.0)};
    if (rank == 0) write_triplet(out, n, triplet[0], triplet[1], triplet[2], reduced.runner_up_id);
    double g[3];
    inverted_hinge_gradient(triplet, g);
    const RowGradient row = row_gradient(*scale * g[0], *scale * g[1], *scale * g[2], triplet[2], 1.0, unit);
    share_gradient(shared, row, reduced.runner_up_id);
  }
  __syncthreads();
  write_gradient<kKeep>(vectors, vectors.row, stash, shared_gradient(shared), target, shared->runner_up, unit,
                        false);
}

// Take a block of columns into the numbers of its rows (see OnlineState in backends/online_state.py). With
// `store` the terms overwrite the logits: exp(y - rest_max) times the softcap's slope, and zero at target and
// runner-up. Blocks and clusters are as in the kernel above. Floors: as above with `store`, and one read
// without.
template <typename Word, bool kKeep>
__global__ void __launch_bounds__(kKeep ? kKeepingThreads : kRereadingThreads, kKeep ? 2 : 1)
    triplet_columns_kernel(RowLayout logits, int columns, int cluster, int64_t first_column,
                           const int64_t* labels, double softcap, float unit, bool store,
                           OnlineStates states) {
  const unsigned n = blockIdx.x / static_cast<unsigned>(cluster);
  const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(cluster));
  const RowVectors<Word> vectors(logits.row<Word>(n), columns, cluster, rank);
  const int target = index_in(labels[n], first_column, columns);
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  Vector* stash = reinterpret_cast<Vector*>(shared + 1);
  double* state = states.state + OnlineStates::kNumbers * static_cast<int64_t>(n);
  const bool capped = softcap != 0.0;
  const double factor = capped ? softcap : 1.0;
  // Rank 0 changes the state, and gradients replace entries. Both are read before two cluster barriers.
  if (threadIdx.x == 0) {
    for (int i = 0; i < OnlineStates::kNumbers; ++i) shared->state[i] = state[i];
    if (target >= 0) shared->state[0] = factor * entry_at(vectors, target);
    const int64_t old_id = states.runner_up_id[n];
    shared->runner_up = index_in(old_id, first_column, columns);
  }
  const Reduced reduced = reduce_row<kKeep>(vectors, target, unit, cluster, rank, shared, stash);
  if (threadIdx.x == 0) {
    const double runner_up = shared->state[1], rest_max = shared->state[2], rest_sum = shared->state[3];
    const double top = factor * reduced.first, largest = factor * reduced.second;
    const bool better = top > runner_up;  // on a tie the earlier column stays
    const double demoted = better ? runner_up : -kDoubleInfinity;
    const double joining = better ? -kDoubleInfinity : top;  // the largest logit of the block joins
    const double new_max = fmax(fmax(rest_max, largest), fmax(demoted, joining));
    const double reference = new_max == -kDoubleInfinity ? 0.0 : new_max;
    const double share = exp(demoted - reference);
    const RowGradient row = row_gradient(0.0, 0.0, 1.0, new_max, factor, unit);
    share_gradient(shared, row, better ? reduced.runner_up_id : shared->runner_up);
    if (rank == 0) {
      const float u = better && runner_up > -kDoubleInfinity ? static_cast<float>(runner_up / factor) : 0.0f;
      states.rescale[n] = static_cast<float>(exp(rest_max - reference));
      states.demoted_id[n] = demoted > -kDoubleInfinity ? states.runner_up_id[n] : -1;
      states.demoted_share[n] = static_cast<float>(share) * slope(u, capped);
      state[0] = shared->state[0];
      state[1] = better ? top : runner_up;
      state[2] = new_max;
      state[3] = rest_sum * exp(rest_max - reference) + exp(log_of_rest(reduced, factor) - reference) +
                 share + exp(joining - reference);
      if (better) states.runner_up_id[n] = first_column + reduced.runner_up_id;
    }
  }
  if (!store) return;
  __syncthreads();
  write_gradient<kKeep>(vectors, vectors.row, stash, shared_gradient(shared), target, shared->runner_up, unit,
                        capped);
}

// Multiply rows by their factors. Floors: one read and one write of each logit, or none for a factor of 1,
// and 5 instructions a logit.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    scale_rows_kernel(RowLayout rows, int columns, const float* factors) {
  const float factor = factors[blockIdx.x];
  if (factor == 1.0f) return;
  const RowVectors<Word> vectors(rows.row<Word>(blockIdx.x), columns, 1, 0);
  write_row<false>(vectors, vectors.row, nullptr, [=](float x) { return x * factor; }, [](Vector&, int) {});
}

// --- launchers ------------------------------------------------------------------------------------

constexpr int64_t kMaxColumns = 1 << 30;  // indices in a row are int
constexpr int64_t kMaxBlocks = INT_MAX;

// Call body(Word{}) for the type of the rows, on the stream's device. Do nothing without rows.
template <typename Body>
void for_rows(const DeviceRows& rows, Stream stream, const Body& body) {
  if (rows.count == 0) return;
  if (rows.columns > kMaxColumns || rows.count > kMaxBlocks / kMaxCluster) {
    throw std::invalid_argument("loku_kernels: at most 2^30 words and 2^28 - 1 rows a call on CUDA, got " +
                                std::to_string(rows.columns) + " and " + std::to_string(rows.count));
  }
  use_device(stream.device);
  for_type_of<Float32Word, BFloat16Word, Float16Word>(rows.dtype, body);
}

RowLayout layout_of(const DeviceRows& rows) {
  return {static_cast<unsigned char*>(rows.data), static_cast<unsigned>(rows.inner), rows.outer_stride,
          rows.inner_stride};
}

float unit_of(double softcap) { return static_cast<float>(kLog2E * (softcap == 0.0 ? 1.0 : softcap)); }

struct FusedPlan {
  int threads, cluster;
  bool keep;
  size_t shared_bytes;
};

// Choose the smallest cluster whose slices let two blocks stay on a multiprocessor. Then one block can load
// while the other computes. The second choice is the largest cluster that fits. The last one is to keep no
// row, with one large block a multiprocessor, because fewer rows in flight are likelier to be still in the L2
// cache.
FusedPlan plan_fused(const DeviceLimits& limits, int64_t columns, int width) {
  const int64_t vectors = (columns + 2 * width - 2) / width;  // the longest head counts
  FusedPlan plan = {kRereadingThreads, 1, false, sizeof(Shared)};
  for (int cluster = 1; cluster <= (limits.clusters ? kMaxCluster : 1); cluster *= 2) {
    const int64_t bytes =
        static_cast<int64_t>(sizeof(Shared)) + (vectors + cluster - 1) / cluster * static_cast<int64_t>(16);
    if (bytes > limits.shared_per_block) continue;
    const int64_t blocks = limits.shared_per_multiprocessor / (bytes + 1024);  // blocks that stay
    plan = {blocks >= 4 ? kThreads : kKeepingThreads, cluster, true, static_cast<size_t>(bytes)};
    if (blocks >= 2) break;
  }
  return plan;
}

// Launch a kernel that reads each row twice, in the form that suits the device. With `twice` false it reads
// each row once.
template <typename Word, typename... Parameters, typename... Arguments>
void launch_fused(const char* name, void (*keeping)(Parameters...), void (*rereading)(Parameters...),
                  const DeviceRows& logits, bool twice, Stream stream, const Arguments&... arguments) {
  FusedPlan plan = {kThreads, 1, false, sizeof(Shared)};
  if (twice) {
    plan = plan_fused(device_limits(name, keeping, stream.device), logits.columns, RowVectors<Word>::kWidth);
  }
  launch(name, plan.keep ? keeping : rereading,
         {dim3(static_cast<unsigned>(logits.count * plan.cluster)), plan.threads, plan.shared_bytes,
          plan.cluster},
         stream.handle, layout_of(logits), static_cast<int>(logits.columns), plan.cluster, arguments...);
}

}  // namespace

std::string cuda_error() { return device_error(); }

// Compute triplet and runner_up_id of logits and labels. Each logit is read once.
void cuda_triplet_forward(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const Triplets& out, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch("triplet_forward", triplet_forward_kernel<Word>,
           {dim3(static_cast<unsigned>(logits.count)), kThreads, sizeof(Shared), 1}, stream.handle,
           layout_of(logits), static_cast<int>(logits.columns), labels, ignore_index, unit_of(0.0), out);
  });
}

// Compute the gradient of the logits of the columns from `first_column` on. It is g_target at the label,
// g_runner_up at the runner-up and g_rest * exp(y - rest) elsewhere, each times the softcap's slope.
// `grad_logits` may be `logits`.
void cuda_triplet_backward(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           int64_t ignore_index, const Triplets& saved, const double* grad_triplet,
                           double softcap, const DeviceRows& grad_logits, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch("triplet_backward", triplet_backward_kernel<Word>,
           {dim3(static_cast<unsigned>(logits.count)), kThreads, 0, 1}, stream.handle, layout_of(logits),
           static_cast<int>(logits.columns), first_column, labels, ignore_index, softcap, unit_of(softcap),
           saved, grad_triplet, layout_of(grad_logits));
  });
}

// Compute forward and backward of IHL in one. The logits become *scale, a number on the device, times the
// gradient.
void cuda_inverted_hinge_(const DeviceRows& logits, const int64_t* labels, int64_t ignore_index,
                          const double* scale, const Triplets& out, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch_fused<Word>("inverted_hinge_", inverted_hinge_kernel<Word, true>,
                       inverted_hinge_kernel<Word, false>, logits, true, stream, labels, ignore_index,
                       unit_of(0.0), scale, out);
  });
}

// Take the logits of the columns from `first_column` on into the states of the rows. With `store` they become
// exp(y - rest_max) times the softcap's slope, and zero at target and runner-up. No label is ignored.
void cuda_triplet_columns_(const DeviceRows& logits, int64_t first_column, const int64_t* labels,
                           double softcap, bool store, const OnlineStates& states, Stream stream) {
  for_rows(logits, stream, [&](auto word) {
    using Word = decltype(word);
    launch_fused<Word>("triplet_columns_", triplet_columns_kernel<Word, true>,
                       triplet_columns_kernel<Word, false>, logits, store, stream, first_column, labels,
                       softcap, unit_of(softcap), store, states);
  });
}

// Multiply each row by its factor. A row whose factor is 1 is not read.
void cuda_scale_rows_(const DeviceRows& rows, const float* factors, Stream stream) {
  for_rows(rows, stream, [&](auto word) {
    launch("scale_rows_", scale_rows_kernel<decltype(word)>,
           {dim3(static_cast<unsigned>(rows.count)), kThreads, 0, 1}, stream.handle, layout_of(rows),
           static_cast<int>(rows.columns), factors);
  });
}

}  // namespace loku
