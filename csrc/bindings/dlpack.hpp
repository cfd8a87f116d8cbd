// SPDX-License-Identifier: Apache-2.0
// Memory of ours as DLPack tensors: the storage's deleter ends the lease. The structures are DLPack's
// public C ABI (dlpack.h) as far as contiguous tensors need it: of version 0.8, which every torch
// takes as a capsule, and of version 1, which its C functions take.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace deepcomm {

struct DlDevice {
    int32_t device_type;
    int32_t device_id;
};

struct DlDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DlManagedTensor {
    DlTensor tensor;
    void* manager_ctx;
    void (*deleter)(DlManagedTensor*);
};

struct DlVersion {
    uint32_t major;
    uint32_t minor;
};

struct DlManagedTensorVersioned {
    DlVersion version;
    void* manager_ctx;
    void (*deleter)(DlManagedTensorVersioned*);
    uint64_t flags;
    DlTensor tensor;
};

constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;
constexpr DlDataType kDlI32{0, 32, 1};
constexpr DlDataType kDlI64{0, 64, 1};
constexpr DlDataType kDlByte{1, 8, 1};
constexpr DlDataType kDlF16{2, 16, 1};
constexpr DlDataType kDlF32{2, 32, 1};
constexpr DlDataType kDlBf16{4, 16, 1};
constexpr DlDataType kDlBool{6, 8, 1};

/// One lease and the tensor that stands for it, of either version. The lease ends with the last
/// storage.
template <typename Managed, typename Lease>
struct LeasedTensor {
    Managed managed{};
    std::vector<int64_t> shape;
    Lease lease;

    LeasedTensor(Lease held, DlDevice device, void* data, DlDataType dtype,
                 std::vector<int64_t> sizes)
        : shape(std::move(sizes)), lease(std::move(held)) {
        managed.tensor.data = data;
        managed.tensor.device = device;
        managed.tensor.ndim = static_cast<int32_t>(shape.size());
        managed.tensor.dtype = dtype;
        managed.tensor.shape = shape.data();
        managed.manager_ctx = this;
        managed.deleter = [](Managed* self) {
            delete static_cast<LeasedTensor*>(self->manager_ctx);
        };
    }
};

/// Returns a contiguous tensor at data as a capsule that keeps lease until its storage is freed.
template <typename Lease>
pybind11::capsule lease_capsule(Lease lease, DlDevice device, void* data, DlDataType dtype,
                                std::vector<int64_t> shape) {
    auto* const leased = new LeasedTensor<DlManagedTensor, Lease>(std::move(lease), device, data,
                                                                  dtype, std::move(shape));
    return pybind11::capsule(&leased->managed, "dltensor", [](PyObject* object) {
        // A consumer renames the capsule and owns the tensor from then on.
        if (PyCapsule_IsValid(object, "dltensor") != 0) {
            auto* const managed =
                static_cast<DlManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
            managed->deleter(managed);
        }
    });
}

}  // namespace deepcomm
