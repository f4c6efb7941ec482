// Everything that CPU bodies include and other files share. It stands ahead of the target of a level: no
// inline function of these may be compiled for more than every CPU has (see core/simd.h).
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
#include <utility>

#include "core/dtype.h"
#include "core/math.h"
#include "core/simd.h"
