// Everything the CPU bodies include that other files share, ahead of the target of a level (common/simd.h).
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#include "common/simd.h"
#include "conv_relu_pool/cpu_kernels.h"
#include "conv_relu_pool/params.h"
#include "conv_relu_pool/relu_pool.h"
