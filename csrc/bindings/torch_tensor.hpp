// SPDX-License-Identifier: Apache-2.0
// Tensors of torch on memory of ours, without linking torch: through the table of C functions that it
// publishes from 2.10 on (DLPack's exchange API), else through its from_dlpack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
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

}  // namespace deepcomm

template <>
struct pybind11::detail::handle_type_name<deepcomm::TorchTensor> {
    static constexpr auto name = const_name("torch.Tensor");
};
