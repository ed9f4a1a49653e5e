// Every kernel of the core on the CPU, with several threads and with one, for ThreadSanitizer and without
// Python. Then a thread changes a label while another one reads it, as a user's thread may.
// scripts/thread_sanitizer.sh builds this file.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "../../../csrc/fisher_cpu.h"
#include "../../../csrc/losses_cpu.h"
#include "../../../csrc/triplet_cpu.h"

namespace loku {
namespace {

constexpr int kThreads = 4;
constexpr int64_t kIgnore = -100;

// Bytes as a kernel takes them, and typed.
struct Bytes {
  std::vector<unsigned char> bytes;
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
};

int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Inputs {
  int64_t rows, vocab, width;
  DType dtype;
  std::mt19937 random{0};
  Bytes logits, weight, direction;
  Ids labels;
  std::vector<double> gradient, factor;

  Inputs(int64_t rows, int64_t vocab, DType dtype) : rows(rows), vocab(vocab), width(7), dtype(dtype) {
    logits = numbers(rows * vocab);
    weight = numbers(vocab * width);
    direction = numbers(rows * width);
    for (int64_t n = 0; n < rows; ++n) labels.push_back(n % 5 == 1 ? kIgnore : int64_t(random() % vocab));
    for (int64_t n = 0; n < 3 * rows; ++n) gradient.push_back(uniform());
    for (int64_t n = 0; n < rows; ++n) factor.push_back(uniform());
  }
  double uniform() { return double(random()) / 4294967296.0 - 0.5; }

  Bytes numbers(int64_t count) {
    Bytes result;
    result.bytes.resize(count * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
      const float x = static_cast<float>(8 * uniform());
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      // float16: any bits whose exponent is not full
      const uint16_t half = static_cast<uint16_t>(dtype == DType::kFloat16 ? random() & 0xbfffu : bits >> 16);
      if (dtype == DType::kFloat32) {
        result.as<float>()[i] = x;
      } else {
        result.as<uint16_t>()[i] = half;
      }
    }
    return result;
  }

  Rows rows_of(Bytes& entries) { return {entries.as<void>(), nullptr, vocab, rows, vocab, dtype}; }
};

// The memory that calls have written, one piece after the other.
struct Results {
  std::vector<Bytes> pieces;
  template <typename T>
  T* piece(int64_t count) {
    pieces.push_back({std::vector<unsigned char>(count * sizeof(T))});
    return pieces.back().as<T>();
  }
  Bytes& copy(const Bytes& bytes) {
    pieces.push_back(bytes);
    return pieces.back();
  }
};

// Call all kernels. Wherever a kernel overwrites its operand, it gets a copy.
Results call_all(Inputs& in, int threads) {
  Results out;
  out.pieces.reserve(100);
  const int64_t n = in.rows;
  const auto triplets = [&] { return Triplets{out.piece<double>(3 * n), out.piece<int64_t>(n)}; };
  const Rows logits = in.rows_of(in.logits);
  const Triplets saved = triplets();
  const Factors factors = {1.0, in.factor.data()};
  const MatrixRows weight = {in.weight.as<void>(), in.width}, direction = {in.direction.as<void>(), in.width};
  for (const float softcap : {0.0f, 5.0f}) {
    triplet_forward(logits, in.labels, kIgnore, softcap, softcap == 0.0f ? saved : triplets(), threads);
    rest_probabilities_(in.rows_of(out.copy(in.logits)), in.labels, kIgnore, softcap, triplets(), threads);
    triplet_backward(logits, 0, in.labels, kIgnore, saved, in.gradient.data(), factors, softcap,
                     in.rows_of(out.copy(in.logits)), threads);
    for (const bool store : {false, true}) {
      const OnlineStates states = {out.piece<double>(4 * n), out.piece<int64_t>(n), out.piece<float>(n),
                                   out.piece<int64_t>(n), out.piece<float>(n)};
      triplet_columns_(in.rows_of(out.copy(in.logits)), 0, in.labels, softcap, store, states, threads);
    }
  }
  inverted_hinge_(in.rows_of(out.copy(in.logits)), in.labels, kIgnore, 0.5, triplets(), threads);
  scale_rows_(in.rows_of(out.copy(in.logits)), factors, threads);
  for (const Reduction reduction : {Reduction::kMean, Reduction::kSum, Reduction::kNone}) {
    token_losses(Loss::kInvertedHinge, saved.triplet, in.labels, kIgnore, reduction, true,
                 out.piece<double>(n), out.piece<double>(3 * n), threads);
    for (const bool overwrite : {false, true}) {
      double* const kept = out.piece<double>(Saved::kNumbers * n);
      logits_loss(in.rows_of(out.copy(in.logits)), in.labels, kIgnore, 0.0f, overwrite, Loss::kCrossEntropy,
                  reduction, false, out.piece<float>(n), kept, threads);
      logits_loss_backward(logits, in.labels, kIgnore, kept, factors, in.rows_of(out.copy(in.logits)),
                           threads);
      hidden_loss_backward(kept, factors, weight, in.vocab, in.labels, direction, 0.0f, 1.0, in.width,
                           in.dtype, out.piece<double>(n * in.width), threads);
    }
    inverted_hinge_loss_(in.rows_of(out.copy(in.logits)), in.labels, kIgnore, 0.5, reduction, false,
                         out.piece<float>(n), threads);
  }
  hidden_gradient(in.gradient.data(), factors, weight, in.vocab, in.labels, saved, direction, 5.0f, 2.0,
                  in.width, in.dtype, out.piece<double>(n * in.width), threads);
  // The rows as two samples: inputs (2, n / 2, vocab) and gradients (2, n / 2, width).
  const Features inputs = {in.logits.as<void>(), in.vocab, n / 2 * in.vocab, in.vocab};
  const Features gradients = {in.direction.as<void>(), in.width, n / 2 * in.width, in.width};
  accumulate_squared_grad_(2, n / 2, in.dtype, inputs, gradients,
                           {out.piece<float>(in.width * in.vocab), in.vocab}, {nullptr, 0}, threads);
  accumulate_squared_grad_(2, n / 2, in.dtype, gradients, inputs, {out.piece<float>(in.vocab), 1},
                           {std::vector<float>(in.width * in.vocab, 2.0f).data(), in.width}, threads);
  if (in.dtype == DType::kBFloat16) {
    add_squares_(in.logits.as<void>(), n, in.vocab, {out.piece<float>(n * in.vocab), in.vocab}, threads);
  }
  return out;
}

// Count the pieces that differ between several threads and one.
int differences() {
  int different = 0, calls = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const auto& [rows, vocab] : {std::pair<int64_t, int64_t>{2, 700}, {3, 300}, {601, 70}}) {
      Inputs inputs(rows, vocab, dtype);
      const Results one = call_all(inputs, 1), several = call_all(inputs, kThreads);
      for (size_t i = 0; i < one.pieces.size(); ++i) {
        different += one.pieces[i].bytes != several.pieces[i].bytes;
        ++calls;
      }
    }
  }
  std::printf("%d results of several threads, of which %d differ from those of one\n", calls, different);
  return different;
}

// Read labels while another thread writes to them, by the function that reads those of a caller.
int wrong_labels() {
  std::vector<int64_t> labels(64, 1);
  std::atomic<bool> end{false};
  std::thread writer([&] {
    while (!end) {
      for (const int64_t label : {int64_t{1} << 40, int64_t{1}}) {
        __atomic_store_n(&labels[63], label, __ATOMIC_RELAXED);
      }
    }
  });
  int copies = 0, wrong = 0, bad = 0;
  for (; copies < 2000 || bad == 0 || bad == copies; ++copies) {
    const Ids own = copy_of(labels.data(), 64);
    wrong += own[63] != 1 && own[63] != int64_t{1} << 40;
    bad += own[63] != 1;
  }
  end = true;
  writer.join();
  std::printf("%d copies of labels that change, %d with a bad label, %d with another\n", copies, bad, wrong);
  return wrong;
}

}  // namespace
}  // namespace loku

int main() { return loku::differences() + loku::wrong_labels() == 0 ? 0 : 1; }
