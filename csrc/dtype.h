// The dtype tags of loku_kernels/native.py.
#pragma once

namespace loku {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace loku
