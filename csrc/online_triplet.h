// The online reduction behind the softmax triplet: the largest logit, its index, and the sum of the
// exponentials of all the others, met in any number of pieces.
//
// The runner-up is kept out of the sum, and the sum is relative to the largest of the *other* logits.
// So neither a dominant target nor a dominant runner-up costs the rest its digits, as subtracting
// them from a full sum would.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define LOKU_HOST_DEVICE __host__ __device__
#else
#define LOKU_HOST_DEVICE
#endif

namespace loku {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct OnlineTriplet {
  float runner_up = kMinusInfinity;  // largest logit so far, the target's aside
  int64_t runner_up_id = -1;
  float rest_max = kMinusInfinity;  // largest of the remaining logits so far
  double rest_sum = 0.0;            // sum over them of exp(y - rest_max)

  // Make `maximum` the reference of the sum, if it is above it. A NaN never is: it shows in the sum.
  LOKU_HOST_DEVICE void raise_rest_max(float maximum) {
    if (maximum > rest_max) {
      if (rest_sum != 0.0) rest_sum *= std::exp(static_cast<double>(rest_max) - static_cast<double>(maximum));
      rest_max = maximum;
    }
  }

  // A logit that is no longer the runner-up joins the rest.
  LOKU_HOST_DEVICE void add_to_rest(float logit) {
    if (logit == kMinusInfinity) return;
    raise_rest_max(logit);
    rest_sum += std::exp(static_cast<double>(logit) - static_cast<double>(rest_max));
  }

  // log of the sum of the exponentials of the rest; -inf where there is no rest.
  LOKU_HOST_DEVICE double rest() const {
    return rest_sum == 0.0 ? static_cast<double>(kMinusInfinity)
                           : static_cast<double>(rest_max) + std::log(rest_sum);
  }

  // What was met elsewhere joins this. On equal runner-ups the lower index wins.
  LOKU_HOST_DEVICE void merge(const OnlineTriplet& other) {
    const bool take =
        other.runner_up > runner_up || (other.runner_up == runner_up && other.runner_up_id < runner_up_id);
    const float demoted = take ? runner_up : other.runner_up;
    if (take) {
      runner_up = other.runner_up;
      runner_up_id = other.runner_up_id;
    }
    raise_rest_max(other.rest_max);
    if (other.rest_sum != 0.0) {
      rest_sum +=
          other.rest_sum * std::exp(static_cast<double>(other.rest_max) - static_cast<double>(rest_max));
    }
    add_to_rest(demoted);
  }
};

}  // namespace loku
