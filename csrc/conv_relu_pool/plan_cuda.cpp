#include "conv_relu_pool/plan.h"

#ifdef DLFAST_WITH_CUDA

namespace dlfast {
namespace {

Choice choose(const CudaConv& c, const PlanContext& context, std::string_view forced,
              bool (*fits)(const CudaConv&, const CudaDevice&)) {
  Choice choice{};
  choice.candidates[choice.count++] = {Path::pytorch, 0, 0};
  if (c.p.pool.channels_last && fits(c, *context.device)) {
    choice.candidates[choice.count++] = {Path::single, 0, 0};
    if (forced == "single") choice.best = 1;
  }
  return choice;
}

}  // namespace

Choice plan_cuda(const ConvBlockParams& p, const PlanContext& context, Part part, std::string_view forced) {
  const CudaConv c{.p = p, .dtype = context.dtype, .products = context.products};
  switch (part) {
    case Part::forward:
      return choose(c, context, forced, conv_forward_fits);
    case Part::grad_input:
      return choose(c, context, forced, conv_grad_input_fits);
    case Part::grad_weight:
      return choose(c, context, forced, conv_grad_weight_fits);
  }
  return {};
}

}  // namespace dlfast
#endif
