// SPDX-License-Identifier: Apache-2.0
// Bytes as a DLPack capsule: the storage's deleter lets go of their owner. The structures are DLPack's
// public C ABI, version 0.8 (dlpack.h), as far as bytes on CPUs need it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

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

/// Bytes and the tensor that stands for them.
struct SharedBytes {
    DlManagedTensor managed{};
    int64_t num_bytes = 0;
    std::shared_ptr<std::byte> data;

    static void end(DlManagedTensor* managed) {
        delete static_cast<SharedBytes*>(managed->manager_ctx);
    }
};

inline pybind11::capsule bytes_capsule(std::shared_ptr<std::byte> data, int64_t num_bytes) {
    constexpr int32_t kCpu = 1;
    constexpr uint8_t kUint = 1;
    auto* const bytes = new SharedBytes;
    bytes->num_bytes = num_bytes;
    bytes->managed.tensor.data = data.get();
    bytes->managed.tensor.device = {kCpu, 0};
    bytes->managed.tensor.ndim = 1;
    bytes->managed.tensor.dtype = {kUint, 8, 1};
    bytes->managed.tensor.shape = &bytes->num_bytes;
    bytes->managed.manager_ctx = bytes;
    bytes->managed.deleter = &SharedBytes::end;
    bytes->data = std::move(data);
    return pybind11::capsule(&bytes->managed, "dltensor", [](PyObject* object) {
        // A consumer renames the capsule and owns the tensor from then on.
        if (PyCapsule_IsValid(object, "dltensor") != 0) {
            auto* const managed =
                static_cast<DlManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
            managed->deleter(managed);
        }
    });
}

}  // namespace deepcomm
