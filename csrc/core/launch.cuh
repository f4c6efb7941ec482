// The launch of a kernel that takes its body as its only argument.
#pragma once

#include <cstddef>
#include <cstdint>

#include <c10/util/StringUtil.h>
#include <c10/util/Type.h>
#include <cuda_runtime.h>

#include "core/launch_check.h"

namespace dlfast {

struct LaunchSize {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  void* stream;
};

// `name` is for the message of an error.
template <typename Body>
void launch(const char* name, void (*kernel)(const Body), const Body& body, const LaunchSize& size) {
  kernel<<<static_cast<unsigned>(size.blocks), static_cast<unsigned>(size.threads),
           static_cast<size_t>(size.shared_bytes), static_cast<cudaStream_t>(size.stream)>>>(body);
  check_launch([&] {
    return c10::str("in ", name, "<", c10::demangle_type<Body>(), ">, ", size.blocks, " blocks of ",
                    size.threads, " threads with ", size.shared_bytes, " bytes of shared memory");
  });
}

}  // namespace dlfast
