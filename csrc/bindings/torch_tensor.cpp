// SPDX-License-Identifier: Apache-2.0
#include "bindings/torch_tensor.hpp"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace deepcomm {

namespace {

constexpr DlVersion kDlVersion{1, 0};

/// DLPack's exchange API, version 1, as far as it is called here; other members have no type.
struct DlExchangeApi {
    DlVersion version;
    const void* previous;
    void* allocate;
    void* from_object;
    int (*to_object)(DlManagedTensorVersioned* tensor, void** object);
    int (*describe)(void* object, DlTensor* tensor);  ///< may be null
};

/// The ways into torch, found once.
struct TorchEntry {
    const DlExchangeApi* api;  ///< null where torch has none
    py::object from_dlpack;

    static TorchEntry find() {
        const py::object torch = py::module_::import("torch");
        const DlExchangeApi* api = nullptr;
        const py::object capsule =
            py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
        if (!capsule.is_none()) {
            api = static_cast<const DlExchangeApi*>(
                PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
            if (api == nullptr) {
                throw py::error_already_set();
            }
        }
        const bool known = api != nullptr && api->version.major == kDlVersion.major;
        return {known ? api : nullptr, torch.attr("from_dlpack")};
    }
};

const TorchEntry& torch_entry() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TorchEntry> entry;
    return entry.call_once_and_store_result(&TorchEntry::find).get_stored();
}

}  // namespace

TorchTensor make_tensor(std::shared_ptr<std::byte> data, DlDataType dtype,
                        std::vector<int64_t> shape) {
    using Lease = std::shared_ptr<std::byte>;
    const TorchEntry& torch = torch_entry();
    std::byte* const begin = data.get();
    const DlDevice device{kDlCpu, 0};
    if (torch.api == nullptr) {
        return TorchTensor(torch.from_dlpack(
            lease_capsule(std::move(data), device, begin, dtype, std::move(shape))));
    }
    auto* const leased = new LeasedTensor<DlManagedTensorVersioned, Lease>(
        std::move(data), device, begin, dtype, std::move(shape));
    leased->managed.version = kDlVersion;
    void* object = nullptr;
    if (torch.api->to_object(&leased->managed, &object) != 0) {  // it owns the tensor in any case
        throw py::error_already_set();
    }
    return TorchTensor(py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)));
}

bool can_describe_tensors() {
    const TorchEntry& torch = torch_entry();
    return torch.api != nullptr && torch.api->describe != nullptr;
}

DlTensor describe_tensor(py::handle tensor) {
    DlTensor described{};
    if (torch_entry().api->describe(tensor.ptr(), &described) != 0) {
        throw py::error_already_set();
    }
    if (described.data == nullptr && std::find(described.shape, described.shape + described.ndim,
                                               0) == described.shape + described.ndim) {
        throw std::runtime_error("tensor: expected one with memory");
    }
    return described;
}

uintptr_t address_of(py::handle tensor) {
    if (tensor.is_none()) {
        return 0;
    }
    const auto address = can_describe_tensors()
                             ? reinterpret_cast<uintptr_t>(describe_tensor(tensor).data)
                             : tensor.attr("data_ptr")().cast<uintptr_t>();
    return address == 0 ? 1 : address;
}

}  // namespace deepcomm
