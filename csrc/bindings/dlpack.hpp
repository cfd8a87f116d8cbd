// SPDX-License-Identifier: Apache-2.0
// Leased symmetric memory as a DLPack capsule: the storage's deleter ends the lease. The structures
// are DLPack's public C ABI, version 0.8 (dlpack.h), as far as contiguous tensors need it.
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

constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;
constexpr DlDataType kDlByte{1, 8, 1};
constexpr DlDataType kDlF16{2, 16, 1};
constexpr DlDataType kDlF32{2, 32, 1};
constexpr DlDataType kDlBf16{4, 16, 1};

/// One lease and the tensor that stands for it. The lease ends with the last storage.
template <typename Lease>
struct LeasedTensor {
    DlManagedTensor managed{};
    std::vector<int64_t> shape;
    Lease lease;

    explicit LeasedTensor(Lease held) : lease(std::move(held)) {}

    static void end(DlManagedTensor* managed) {
        delete static_cast<LeasedTensor*>(managed->manager_ctx);
    }
};

/// Returns a contiguous tensor at data as a capsule that keeps lease until its storage is freed.
template <typename Lease>
pybind11::capsule lease_capsule(Lease lease, DlDevice device, void* data, DlDataType dtype,
                                std::vector<int64_t> shape) {
    auto* const leased = new LeasedTensor<Lease>(std::move(lease));
    leased->shape = std::move(shape);
    leased->managed.tensor.data = data;
    leased->managed.tensor.device = device;
    leased->managed.tensor.ndim = static_cast<int32_t>(leased->shape.size());
    leased->managed.tensor.dtype = dtype;
    leased->managed.tensor.shape = leased->shape.data();
    leased->managed.manager_ctx = leased;
    leased->managed.deleter = &LeasedTensor<Lease>::end;
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
