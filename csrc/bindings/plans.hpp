// SPDX-License-Identifier: Apache-2.0
// Plans of operations, by all that can be given to these: looked up by one call, which also finds where
// the tensors begin. What a plan is, only Python knows.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace deepcomm {

/// An object that stubs name typing.Any.
class AnyObject : public pybind11::object {
  public:
    AnyObject() = default;
    explicit AnyObject(pybind11::object&& object) : pybind11::object(std::move(object)) {}
};

/// Two calls have one plan if their tensors are alike in device, dtype, shape, strides and in how far
/// from a multiple of kAlign each begins, and their options equal texts or the same objects.
class Plans {
  public:
    static constexpr size_t kMostInputs = 4;
    static constexpr uintptr_t kAlign = 16;

    using Addresses = std::array<uintptr_t, kMostInputs>;

    /// Lets a plan know where the inputs of a call begin.
    using Fill = std::function<void(const Addresses&)>;

    /// Forgets all of them before there are more than most.
    explicit Plans(size_t most) : most_(most) {}

    /// Objects of a tuple or of an array.
    class Objects {
      public:
        Objects(const pybind11::tuple& tuple)  // NOLINT(google-explicit-constructor)
            : first_(PySequence_Fast_ITEMS(tuple.ptr())), size_(tuple.size()) {}
        template <size_t kSize>
        Objects(PyObject* const (&array)[kSize])  // NOLINT(google-explicit-constructor)
            : first_(array), size_(kSize) {}

        PyObject* const* begin() const { return first_; }
        PyObject* const* end() const { return first_ + size_; }
        size_t size() const { return size_; }

      private:
        PyObject* const* first_;
        size_t size_;
    };

    /// What a plan is looked up by. The inputs and the others are tensors or None.
    struct Call {
        Objects inputs;
        Objects others;
        Objects options;
    };

    /// Returns what was kept for such a call, filled; None if nothing. Addresses are those that
    /// bindings/torch_tensor.hpp tells of.
    AnyObject find(const Call& call);

    /// Remembers the plan of such a call, unless it has what is no tensor.
    void keep(pybind11::object plan, Fill fill, const Call& call);

    size_t size() const { return plans_.size(); }

  private:
    struct Kept {
        pybind11::object plan;
        Fill fill;
        std::vector<pybind11::object> options;  ///< their addresses are part of the key
    };

    /// Writes the key of a call, and where its inputs begin. False: it has what is no tensor.
    bool describe(const Call& call);

    size_t most_;
    std::unordered_map<std::string, Kept> plans_;
    // Written anew for each call, in memory that is there:
    std::string key_;
    Addresses addresses_{};
};

}  // namespace deepcomm

template <>
struct pybind11::detail::handle_type_name<deepcomm::AnyObject> {
    static constexpr auto name = const_name("typing.Any");
};
