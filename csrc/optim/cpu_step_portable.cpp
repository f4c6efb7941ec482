// The CPU optimizer step for one SIMD level; see common/simd.h for the order of includes.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "optim/cpu_step.h"

#define DLFAST_LEVEL portable
#define DLFAST_LANES 4
#include "optim/cpu_body.h"
