// SPDX-License-Identifier: Apache-2.0
#include "host/nccl.hpp"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdio>
#include <cstring>

namespace deepcomm::host {

namespace {

constexpr char kName[] = "libnccl.so.2";
constexpr char kRemedy[] = "pip install deepcomm[cu12] or deepcomm[cu13], as torch's CUDA";

/// What a file with NCCL's functions can be called: the library itself under another name than the
/// loader's, or a torch that was linked with NCCL inside.
constexpr std::array<const char*, 2> kPrefixes{"libnccl.so", "libtorch_cuda.so"};

constexpr std::array<const char*, 9> kResultNames{
    "ncclSuccess",       "ncclUnhandledCudaError", "ncclSystemError",
    "ncclInternalError", "ncclInvalidArgument",    "ncclInvalidUsage",
    "ncclRemoteError",   "ncclInProgress",         "ncclTimeout",
};

bool has_nccl(void* library) { return dlsym(library, "ncclGetVersion") != nullptr; }

int look_at_object(dl_phdr_info* object, size_t /*size*/, void* found) {
    const char* const path = object->dlpi_name == nullptr ? "" : object->dlpi_name;
    const char* const slash = std::strrchr(path, '/');
    const char* const name = slash == nullptr ? path : slash + 1;
    for (const char* const prefix : kPrefixes) {
        if (std::strncmp(name, prefix, std::strlen(prefix)) == 0) {
            static_cast<std::string*>(found)->assign(path);
            return 1;
        }
    }
    return 0;
}

void* find_loaded() {
    void* const by_name = dlopen(kName, RTLD_NOW | RTLD_NOLOAD);
    if (by_name != nullptr) return by_name;
    std::string path;
    dl_iterate_phdr(look_at_object, &path);
    void* const library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr || has_nccl(library)) return library;
    dlclose(library);
    return nullptr;
}

/// Null where it cannot be opened; then why is appended to reasons.
void* try_to_open(const std::string& path, std::string& reasons) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* const reason = dlerror();
        reasons += format("%s%s cannot be opened: %s", reasons.empty() ? "" : "; ", path.c_str(),
                          reason == nullptr ? "unknown" : reason);
    }
    return library;
}

template <typename Pointer>
void find_function(void* library, const std::string& path, const char* name, Pointer& function) {
    function = reinterpret_cast<Pointer>(dlsym(library, name));
    if (function == nullptr) {
        throw NcclError(format("%s: expected NCCL %s or newer, got a library without %s",
                               path.c_str(), nccl_version_text(nccl::kOldestVersion).c_str(),
                               name));
    }
}

std::string file_of(void* function, const std::string& otherwise) {
    Dl_info info{};
    const bool is_known = dladdr(function, &info) != 0 && info.dli_fname != nullptr;
    return is_known ? info.dli_fname : otherwise;
}

}  // namespace

std::shared_ptr<Nccl> Nccl::find(const std::string& path) {
    if (void* const library = find_loaded()) {
        return std::shared_ptr<Nccl>(new Nccl(library, kName, true));
    }
    std::string reasons;
    for (const std::string& name : {path, std::string(kName)}) {
        void* const library = name.empty() ? nullptr : try_to_open(name, reasons);
        if (library != nullptr) {
            return std::shared_ptr<Nccl>(new Nccl(library, name, false));
        }
    }
    throw NcclError(format("%s; %s", reasons.c_str(), kRemedy));
}

std::shared_ptr<Nccl> Nccl::open(const std::string& path) {
    std::string reasons;
    void* const library = try_to_open(path, reasons);
    if (library == nullptr) {
        throw NcclError(format("%s; %s", reasons.c_str(), kRemedy));
    }
    return std::shared_ptr<Nccl>(new Nccl(library, path, false));
}

Nccl::Nccl(void* library, const std::string& name, bool was_loaded) : was_loaded_(was_loaded) {
#define DEEPCOMM_FIND(result, function, parameters) \
    find_function(library, name, #function, api_.function);
    DEEPCOMM_NCCL_FUNCTIONS(DEEPCOMM_FIND)
#undef DEEPCOMM_FIND
#define DEEPCOMM_LOOK_FOR(result, function, parameters) \
    api_.function = reinterpret_cast<decltype(api_.function)>(dlsym(library, #function));
    DEEPCOMM_NCCL_OPTIONAL_FUNCTIONS(DEEPCOMM_LOOK_FOR)
#undef DEEPCOMM_LOOK_FOR
    path_ = file_of(reinterpret_cast<void*>(api_.ncclGetVersion), name);
    DEEPCOMM_NCCL_CHECK(*this, ncclGetVersion(&version_));
    if (version_ < nccl::kOldestVersion || version_ >= nccl::kNextSeries) {
        throw NcclError(format("%s: expected NCCL %s or newer, of series 2, got %s", path_.c_str(),
                               nccl_version_text(nccl::kOldestVersion).c_str(),
                               nccl_version_text(version_).c_str()));
    }
}

nccl::UniqueId Nccl::make_unique_id() const {
    nccl::UniqueId id{};
    DEEPCOMM_NCCL_CHECK(*this, ncclGetUniqueId(&id));
    return id;
}

void Nccl::check(nccl::Result code, const std::string& call) const {
    if (code == nccl::kRemoteError) {
        throw PeerLost(describe(code, call), -1);
    }
    if (code != nccl::kSuccess && code != nccl::kInProgress) {
        throw NcclError(describe(code, call));
    }
}

void Nccl::log(nccl::Result code, const char* call) const noexcept {
    if (code != nccl::kSuccess && code != nccl::kInProgress) {
        std::fprintf(stderr, "deepcomm: %s\n", describe(code, call).c_str());
    }
}

std::string Nccl::describe(nccl::Result code, const std::string& call) const {
    const auto index = static_cast<size_t>(code);
    const char* const name = index < kResultNames.size() ? kResultNames[index] : "unknown";
    const char* const meaning = api_.ncclGetErrorString(code);
    // NOTE: without a communicator, which another thread may be aborting; NCCL keeps one a process.
    const char* const last = api_.ncclGetLastError(nullptr);
    std::string text = format("%s failed: %d %s (%s)", call.c_str(), code, name,
                              meaning == nullptr ? "no description" : meaning);
    if (last != nullptr && *last != '\0') {
        text += format("; %s", last);
    }
    return text;
}

std::string nccl_version_text(int version) {
    return format("%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace deepcomm::host
