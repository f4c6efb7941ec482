// An operator of the dispatcher, called with argument structs.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <utility>

#include "core/schema.h"

namespace dlfast {

template <typename R, typename List>
struct FunctionOf;
template <typename R, typename... Ts>
struct FunctionOf<R, TypeList<Ts...>> {
  using Type = R(Ts...);
};

template <typename Signature>
class Operator;
template <typename R, typename... Args>
class Operator<R(Args...)> {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Flat>()) {}

  R operator()(Args... args) const {
    return std::apply([&](auto&&... flat) { return handle_.call(std::forward<decltype(flat)>(flat)...); },
                      std::tuple_cat(SchemaArgs<Args>::to_schema(std::forward<Args>(args))...));
  }

 private:
  using Flat = typename FunctionOf<R, FlatArgs<Args...>>::Type;
  c10::TypedOperatorHandle<Flat> handle_;
};

}  // namespace dlfast
