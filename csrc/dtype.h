// The dtype tags of loku_kernels/backends/native.py.
#pragma once

namespace loku {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Call body(T{}) for the one of three types that stands for `dtype`.
template <typename ForFloat32, typename ForBFloat16, typename ForFloat16, typename Body>
void for_type_of(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(ForFloat32{});
    case DType::kBFloat16:
      return body(ForBFloat16{});
    case DType::kFloat16:
      return body(ForFloat16{});
  }
}

}  // namespace loku
