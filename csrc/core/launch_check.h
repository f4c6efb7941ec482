// Errors of CUDA launches, with the names that tell which one it was.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>

namespace dlfast {

// What `run` throws gets the words of `describe()` added, which is asked for only then.
template <typename Describe, typename Run>
void naming(Describe describe, Run run) {
  try {
    run();
  } catch (c10::Error& error) {
    error.add_context(describe());
    throw;
  }
}

// After every launch. `describe` names the kernel, its grid and its shared memory.
template <typename Describe>
void check_launch(Describe describe) {
  naming(describe, [] { C10_CUDA_KERNEL_LAUNCH_CHECK(); });
}

}  // namespace dlfast
