// SPDX-License-Identifier: Apache-2.0
// Tensors of torch, made on memory of ours or looked into, without linking torch: through the table of
// C functions that it publishes from 2.10 on (DLPack's exchange API), else through its Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/dlpack.hpp"

namespace deepcomm {

/// An object that stubs name torch.Tensor.
class TorchTensor : public pybind11::object {
  public:
    TorchTensor() = default;
    explicit TorchTensor(pybind11::object&& object) : pybind11::object(std::move(object)) {}
};

/// Returns a contiguous tensor on the CPU at data, which its storage keeps alive.
TorchTensor make_tensor(std::shared_ptr<std::byte> data, DlDataType dtype,
                        std::vector<int64_t> shape);

/// Whether torch has the C function that describe_tensor calls.
bool can_describe_tensors();

/// Returns a tensor's address, type and shape, in a fifth of the time that asking for each takes; valid
/// while the tensor is, which stays the owner. Throws what torch raises where the object is none, or
/// none that it can describe, and RuntimeError where it has elements but no memory.
DlTensor describe_tensor(pybind11::handle tensor);

/// Returns a tensor's address: 0 for None, and never 0 for an empty tensor.
uintptr_t address_of(pybind11::handle tensor);

/// An argument that is a tensor or None in Python.
struct TensorAddress {
    uintptr_t value = 0;
};

}  // namespace deepcomm

template <>
struct pybind11::detail::handle_type_name<deepcomm::TorchTensor> {
    static constexpr auto name = const_name("torch.Tensor");
};

template <>
struct pybind11::detail::type_caster<deepcomm::TensorAddress> {
    PYBIND11_TYPE_CASTER(deepcomm::TensorAddress, const_name("torch.Tensor | None"));

    bool load(handle tensor, bool /*convert*/) {
        value.value = deepcomm::address_of(tensor);
        return true;
    }
};
