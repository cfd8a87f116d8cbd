// SPDX-License-Identifier: Apache-2.0
#include "host/function.hpp"

#include <algorithm>

#include "host/put_off.hpp"

namespace deepcomm::host {
namespace {

constexpr int kSharedUnit = 128;  ///< bytes in which an SM gives shared memory to blocks

}  // namespace

Function::Function(std::shared_ptr<Device> device, const KernelImage& image)
    : device_(std::move(device)), symbol_(image.symbol), shared_bytes_(image.shared_bytes) {
    // Older drivers have no place in a graph for it.
    is_early_ = image.awaits_ahead && device_->driver().version() >= cu::kDriverOfGraphEdges;
    const Device::Current current(*device_);
    device_->driver().check(device_->driver().api().cuModuleLoadDataEx(&module_, image.cubin.data(),
                                                                       0, nullptr, nullptr),
                            "cuModuleLoadDataEx", symbol_ + " on " + device_->label());
    try {
        load(image);
    } catch (const Error&) {
        DEEPCOMM_CUDA_LOG(device_->driver(), cuModuleUnload(module_));
        throw;
    }
}

void Function::load(const KernelImage& image) {
    const Driver& driver = device_->driver();
    DEEPCOMM_CUDA_CHECK(driver, cuModuleGetFunction(&function_, module_, symbol_.c_str()));
    // Older drivers load a function when its attributes are asked for.
    if (driver.api().cuFuncLoad != nullptr) {
        DEEPCOMM_CUDA_CHECK(driver, cuFuncLoad(function_));
    }
    DEEPCOMM_CUDA_CHECK(driver,
                        cuFuncSetAttribute(function_, cu::kMaxDynamicSharedBytes, shared_bytes_));
    int limit = 0;
    DEEPCOMM_CUDA_CHECK(driver, cuFuncGetAttribute(&limit, cu::kMaxThreadsPerBlock, function_));
    max_threads_ = image.max_threads > 0 ? image.max_threads : limit;
    DEEPCOMM_CUDA_CHECK(
        driver, cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &blocks_per_sm_, function_, max_threads_, static_cast<size_t>(shared_bytes_)));
    if (driver.api().cuFuncGetParamInfo != nullptr) {
        size_t offset = 0;
        size_t num_bytes = 0;
        DEEPCOMM_CUDA_CHECK(driver, cuFuncGetParamInfo(function_, 0, &offset, &num_bytes));
        params_bytes_ = static_cast<int64_t>(num_bytes);
    }
}

Function::~Function() {
    put_off(device_, [module = module_](const Device& device) {
        const Device::Current current(device, std::nothrow);
        DEEPCOMM_CUDA_LOG(device.driver(), cuModuleUnload(module));
    });
}

void Function::spread_over(int num_sms) {
    if (!is_early_ || num_sms != device_->attribute(cu::kNumSms)) {
        return;
    }
    const Driver& driver = device_->driver();
    const Device::Current current(*device_);
    int static_bytes = 0;
    DEEPCOMM_CUDA_CHECK(driver,
                        cuFuncGetAttribute(&static_bytes, cu::kStaticSharedBytes, function_));
    own_shared_bytes_ = static_bytes + device_->attribute(cu::kReservedSharedBytes);
    sm_shared_bytes_ = device_->attribute(cu::kSmSharedBytes);
    spread_sms_ = num_sms;
    DEEPCOMM_CUDA_CHECK(
        driver, cuFuncSetAttribute(function_, cu::kMaxDynamicSharedBytes, shared_bytes_of(1)));
}

int Function::shared_bytes_of(int grid) const {
    const int share = spread_sms_ > 0 ? (grid + spread_sms_ - 1) / spread_sms_ : blocks_per_sm_;
    if (share >= blocks_per_sm_) {
        return shared_bytes_;
    }
    const int too_many_bytes = sm_shared_bytes_ / (share + 1) + kSharedUnit;
    return std::max(shared_bytes_, too_many_bytes - own_shared_bytes_);
}

void Function::launch(int grid, const void* params, int64_t num_bytes, cu::Stream stream) const {
    DEEPCOMM_CHECK_ARG(grid > 0, "grid: expected at least 1 block, got %d", grid);
    DEEPCOMM_CHECK_ARG(params_bytes_ < 0 || num_bytes == params_bytes_,
                       "params: expected the %lld bytes that %s takes, got %lld",
                       static_cast<long long>(params_bytes_), symbol_.c_str(),
                       static_cast<long long>(num_bytes));
    const Device::Current current(*device_);
    cu::LaunchConfig config{};
    config.grid[0] = static_cast<unsigned>(grid);
    config.grid[1] = config.grid[2] = 1;
    config.block[0] = static_cast<unsigned>(max_threads_);
    config.block[1] = config.block[2] = 1;
    config.shared_bytes = static_cast<unsigned>(shared_bytes_of(grid));
    config.stream = stream;
    cu::LaunchAttribute early{};
    early.id = cu::kProgrammaticStreamSerialization;
    early.value = 1;
    if (is_early_) {
        config.attributes = &early;
        config.num_attributes = 1;
    }
    // The driver only reads through the pointers.
    void* arguments[] = {const_cast<void*>(params)};
    const cu::Result code =
        device_->driver().api().cuLaunchKernelEx(&config, function_, arguments, nullptr);
    if (code != cu::kSuccess) {
        device_->driver().check(code, "cuLaunchKernelEx",
                                format("%s, %d blocks of %d threads on %s", symbol_.c_str(), grid,
                                       max_threads_, device_->label().c_str()));
    }
}

}  // namespace deepcomm::host
