// The online reduction behind the softmax triplet: the largest logit, its index, and the sum of the
// exponentials of all the others.
//
// The sum omits the runner-up. It is relative to the largest of the *other* logits. So neither a dominant
// target nor a dominant runner-up costs the rest its digits, as their subtraction from a full sum would.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace loku {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct OnlineTriplet {
  float runner_up = kMinusInfinity;  // largest logit so far, without the target's
  int64_t runner_up_id = -1;
  float rest_max = kMinusInfinity;  // largest of the remaining logits so far
  double rest_sum = 0.0;            // sum over them of exp(y - rest_max)

  // Make `maximum` the reference of the sum, if it is above the old one. A NaN never is, but it shows in the
  // sum.
  void raise_rest_max(float maximum) {
    if (maximum > rest_max) {
      if (rest_sum != 0.0) rest_sum *= std::exp(static_cast<double>(rest_max) - static_cast<double>(maximum));
      rest_max = maximum;
    }
  }

  // Add a logit that is no longer the runner-up to the rest.
  void add_to_rest(float logit) {
    if (logit == kMinusInfinity) return;
    raise_rest_max(logit);
    rest_sum += std::exp(static_cast<double>(logit) - static_cast<double>(rest_max));
  }

  // Compute the log of the sum of the exponentials of the rest. It is -inf without a rest.
  double rest() const {
    return rest_sum == 0.0 ? static_cast<double>(kMinusInfinity)
                           : static_cast<double>(rest_max) + std::log(rest_sum);
  }
};

}  // namespace loku
