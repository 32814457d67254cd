// Runs an exported model in C++: masks or classes of images, or its speed. Made by `make cpp/runner`.
//
//     cpp/runner MODEL IMAGES...                            MODEL: a .ts.pt or .pt2 of export.py
//     cpp/runner MODEL --out FOLDER IMAGES...               masks go to FOLDER (predictions)
//     cpp/runner MODEL --bench SIZE SECONDS THREADS BATCH...   times of forward passes, as JSON
//
// Images are PNG, JPEG, PGM or PPM of any size; they are brought to the size that the model was
// trained at, and masks back, as in predict.py. A mask is a palette PNG; its values are classes.

#include <malloc.h>

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <unordered_map>

#include <ATen/Parallel.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include "images.h"

namespace fs = std::filesystem;
using Metadata = std::unordered_map<std::string, std::string>;

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

void write_mask(const Tensor& mask, const std::vector<std::string>& palette, const fs::path& path) {
    png_image image{.version = PNG_IMAGE_VERSION, .width = png_uint_32(mask.size(1)),
                    .height = png_uint_32(mask.size(0)), .format = PNG_FORMAT_RGB_COLORMAP,
                    .colormap_entries = png_uint_32(palette.size())};
    std::vector<uint8_t> colours;
    for (const auto& colour : palette)
        for (int i = 0; i < 6; i += 2)
            colours.push_back(std::stoi(colour.substr(i, 2), nullptr, 16));
    // a reader never sees half a mask
    const fs::path half = path.parent_path() / ("." + path.filename().string() + "." +
                                                std::to_string(getpid()) + ".tmp");
    fs::remove(half);  // a link that someone put there would be followed
    Tensor values = mask.contiguous();
    try {
        if (!png_image_write_to_file(&image, half.c_str(), 0, values.data_ptr(), 0, colours.data()))
            throw Error(path.string() + ": " + image.message);
        fs::rename(half, path);
    } catch (const std::exception&) {
        std::error_code ignored;
        fs::remove(half, ignored);
        throw;
    }
}

// The file of each image's mask. An Error, before anything is written, where two would be one, or
// one is, by whatever name, a file that is read.
std::vector<fs::path> targets_of(const std::vector<std::string>& images, const std::string& model,
                                 const fs::path& out) {
    std::vector<fs::path> targets;
    std::map<fs::path, std::string> written;
    std::set<std::pair<dev_t, ino_t>> read;
    struct stat found;
    if (!stat(model.c_str(), &found)) read.emplace(found.st_dev, found.st_ino);
    for (const auto& image : images) {
        targets.push_back(out / fs::path(image).stem().concat(".png"));
        const auto [other, first] = written.emplace(targets.back(), image);
        if (!first)
            throw Error(image + " and " + other->second + " would both write " +
                        targets.back().string() + "; predict them into two --out");
        if (!stat(image.c_str(), &found)) read.emplace(found.st_dev, found.st_ino);
    }
    for (const auto& target : targets)
        if (!stat(target.c_str(), &found) && read.contains({found.st_dev, found.st_ino}))
            throw Error(target.string() + " is a file that is read, and would be overwritten; "
                        "choose another --out");
    return targets;
}

double number(const std::string& text) {  // positive; 0 where it is none
    try {
        const double value = std::stod(text);
        return value > 0 && value < 1e9 ? value : 0;
    } catch (const std::exception&) {
        return 0;
    }
}

std::string first_line(const std::exception& error) {  // torch appends a stack trace
    const std::string message = error.what();
    return message.substr(0, message.find('\n'));
}

// ---- the model: a function of uint8 images (N, C, H, W), and what export.py says of it ----

Error no_model(const std::string& path, const std::string& why) {
    return Error(path + " is no model that export.py made (" + why + ")");
}

std::pair<std::function<Tensor(const Tensor&)>, Metadata> load(const std::string& path) try {
    if (path.ends_with(".pt2")) {
        auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
        return {[loader](const Tensor& images) { return loader->run({images})[0]; },
                loader->get_metadata()};
    }
    Metadata about{{"classes", ""}, {"palette", ""}, {"stride", ""},
                   {"size", ""}, {"mean", ""}, {"data", ""}};
    auto module = std::make_shared<torch::jit::Module>(torch::jit::load(path, torch::kCPU, about));
    return {[module](const Tensor& images) { return module->forward({images}).toTensor(); }, about};
} catch (const std::exception& error) {
    throw no_model(path, first_line(error));
}

// KiB: "VmRSS:" what this process holds now, "VmHWM:" the most that it ever held. Not getrusage,
// which counts what the parent process held when it started this one.
long memory(const std::string& which) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with(which)) return std::stol(line.substr(which.size()));
    return 0;
}

void bench(const std::function<Tensor(const Tensor&)>& model, int channels, int size, double least,
           const std::vector<int>& batches, long before) {
    std::string gap = "{";
    for (const int batch : batches) {
        const Tensor images = torch::randint(256, {batch, channels, size, size}, torch::kUInt8);
        std::vector<double> seconds;
        double total = 0;
        for (int i = 0; i < 2; i++) model(images);
        while (total < least || seconds.size() < 3) {
            const auto start = std::chrono::steady_clock::now();
            model(images);
            const auto end = std::chrono::steady_clock::now();
            seconds.push_back(std::chrono::duration<double>(end - start).count());
            total += seconds.back();
        }
        std::cout << gap << '"' << batch << "\": {\"peak_mb\": "
                  << (memory("VmHWM:") - before) / 1024 << ", \"seconds\": [";
        for (size_t i = 0; i < seconds.size(); i++) std::cout << (i ? ", " : "") << seconds[i];
        std::cout << "]}";
        gap = ", ";
    }
    std::cout << "}\n";
}

int run(int argc, char** argv) {
    const Error usage("usage: runner MODEL [--out FOLDER] IMAGES... | "
                      "--bench SIZE SECONDS THREADS BATCH...");
    if (argc < 3) throw usage;
    mallopt(M_MMAP_THRESHOLD, 1 << 30);  // keep large tensors' pages between passes
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    const long before = memory("VmRSS:");
    c10::InferenceMode inference;
    auto [model, about] = load(argv[1]);
    const auto classes = split(about["classes"]), palette = split(about["palette"]);
    if (classes.empty()) throw no_model(argv[1], "it names no classes");
    const int channels = split(about["mean"]).size(), stride = number(about["stride"]);
    if (about["size"].empty())
        throw Error(std::string(argv[1]) +
                    " does not say the size it was trained at: export it anew");
    const int size = number(about["size"]);
    if ((channels != 1 && channels != 3) || stride < 1 || stride > 64 || size < 1 ||
        size > 1 << 13 || size % stride || (!palette.empty() && palette.size() != classes.size()))
        throw Error(std::string(argv[1]) + " has a damaged description");
    int first = 2;
    fs::path out = "predictions";
    if (std::string(argv[2]) == "--bench") {
        std::vector<double> wanted;
        for (int i = 3; i < argc; i++) wanted.push_back(number(argv[i]));
        if (wanted.size() < 4 || *std::min_element(wanted.begin(), wanted.end()) <= 0 ||
            std::fmod(wanted[0], stride) ||
            std::any_of(wanted.begin() + 2, wanted.end(), [](double n) { return n != std::trunc(n); }))
            throw Error("--bench wants SIZE SECONDS THREADS BATCH..., whole but for SECONDS, and of "
                        "SIZE a multiple of " + std::to_string(stride));
        at::set_num_threads(wanted[2]);
        bench(model, channels, wanted[0], wanted[1], {wanted.begin() + 3, wanted.end()}, before);
        return 0;
    }
    if (std::string(argv[2]) == "--out" && argc > 4) out = argv[3], first = 4;
    for (int i = first; i < argc; i++)  // a file of such a name is ./--name
        if (std::string(argv[i]).starts_with("--")) throw usage;
    if (about["data"].find("SYNTHETIC") != std::string::npos)
        std::cerr << "NOTE: " << argv[1] << " was trained on " << about["data"] << "\n";
    const std::vector<std::string> images(argv + first, argv + argc);
    std::vector<fs::path> targets;
    if (!palette.empty()) targets = targets_of(images, argv[1], out);
    for (size_t i = 0; i < images.size(); i++) {
        const std::string& path = images[i];
        Tensor image;
        try {
            image = read_image(path, channels);
        } catch (const std::exception& error) {
            throw Error(path + ": " + first_line(error));
        }
        const Tensor pixels = to_size(image, size).permute({2, 0, 1}).contiguous();
        const Tensor logits = model(pixels.unsqueeze(0))[0];
        if (logits.size(0) != int64_t(classes.size()))
            throw no_model(argv[1], "it gives " + std::to_string(logits.size(0)) +
                                        " classes and names " + std::to_string(classes.size()));
        if (palette.empty()) {
            const auto [odds, best] = logits.softmax(0).max(0);
            std::printf("%s: %s %.1f %%\n", path.c_str(),
                        classes.at(best.item<int64_t>()).c_str(), 100 * odds.item<float>());
            continue;
        }
        fs::create_directories(out);
        const Tensor mask = logits.argmax(0).to(torch::kUInt8);
        write_mask(mask_to(mask, image.size(0), image.size(1)), palette, targets[i]);
        std::printf("%s -> %s\n", path.c_str(), targets[i].c_str());
    }
    return 0;
}

int main(int argc, char** argv) {
    try {
        const int code = run(argc, argv);
        if (!std::cout.flush() || std::fflush(stdout) || std::ferror(stdout))
            throw Error("standard output cannot be written");
        return code;
    } catch (const std::exception& error) {
        std::cerr << "error: " << first_line(error) << "\n";
        return 2;
    }
}
