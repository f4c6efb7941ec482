// Argument structs in operator schemas. A schema lists plain arguments, kernels take structs: here the one is
// made of the other, in both directions, so that a struct's arguments are spelled once.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

namespace dlfast {

template <typename... Ts>
struct TypeList {
  static constexpr size_t size = sizeof...(Ts);
};

// How an argument of a kernel stands in a schema: as these arguments, in this order. Structs specialise it.
template <typename T>
struct SchemaArgs {
  using Types = TypeList<T>;
  static T from_schema(const char* /*op*/, T value) { return std::forward<T>(value); }
  static std::tuple<T> to_schema(T value) { return std::tuple<T>(std::forward<T>(value)); }
};

template <typename... Lists>
struct Concat;
template <typename... Ts>
struct Concat<TypeList<Ts...>> {
  using Type = TypeList<Ts...>;
};
template <typename... As, typename... Bs, typename... Rest>
struct Concat<TypeList<As...>, TypeList<Bs...>, Rest...> {
  using Type = typename Concat<TypeList<As..., Bs...>, Rest...>::Type;
};

template <typename... Args>
using FlatArgs = typename Concat<typename SchemaArgs<Args>::Types...>::Type;

// A string as a template argument.
template <size_t n>
struct OpName {
  char text[n];
  // NOLINTNEXTLINE(google-explicit-constructor): a literal is meant to become one.
  constexpr OpName(const char (&from)[n]) {
    for (size_t i = 0; i < n; ++i) text[i] = from[i];
  }
};

template <OpName op, auto f, typename Signature, typename Flat>
struct KernelOf;

template <OpName op, auto f, typename R, typename... Args, typename... Flat>
struct KernelOf<op, f, R (*)(Args...), TypeList<Flat...>> {
  static R call(Flat... flat) { return take(std::index_sequence_for<Args...>(), std::tie(flat...)); }

 private:
  static constexpr size_t sizes[] = {SchemaArgs<Args>::Types::size...};
  static constexpr size_t offset_of(size_t index) {
    size_t offset = 0;
    for (size_t i = 0; i < index; ++i) offset += sizes[i];
    return offset;
  }
  template <typename T, size_t offset, size_t... parts, typename Tuple>
  static decltype(auto) one(std::index_sequence<parts...>, const Tuple& all) {
    return SchemaArgs<T>::from_schema(op.text, std::get<offset + parts>(all)...);
  }
  template <size_t... i, typename Tuple>
  static R take(std::index_sequence<i...>, const Tuple& all) {
    return f(one<Args, offset_of(i)>(std::make_index_sequence<sizes[i]>(), all)...);
  }
};

template <typename Signature>
struct FlatOf;
template <typename R, typename... Args>
struct FlatOf<R (*)(Args...)> {
  using Type = FlatArgs<Args...>;
};

// `f` as a kernel of the dispatcher; `op` is the name that messages give.
template <OpName op, auto f>
constexpr auto* kernel_of = &KernelOf<op, f, decltype(f), typename FlatOf<decltype(f)>::Type>::call;

}  // namespace dlfast
