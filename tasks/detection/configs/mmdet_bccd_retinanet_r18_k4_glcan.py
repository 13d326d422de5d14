# ruff: noqa: C408
# An MMDetection config: blood cells (BCCD, Pascal VOC form), RetinaNet R18 from scratch at 320 px.
# Its last three lines make MMDetection's own tools train it by local learning, with --amp, --resume and so on:
#     PYTHONPATH=. python .../mmdet/.mim/tools/train.py tasks/detection/configs/mmdet_bccd_retinanet_r18_k4_glcan.py
_base_ = ["mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"]

classes = ("Platelets", "RBC", "WBC")

model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(out_channels=128),
    bbox_head=dict(num_classes=len(classes), in_channels=128, feat_channels=128, stacked_convs=2),
)

resize = dict(type="Resize", scale=(320, 320), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    resize,
    dict(type="RandomFlip", prob=0.5),
    # One of the training boxes has no size, and an infinite loss.
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(
    _delete_=True,
    type="XMLDataset",
    metainfo=dict(classes=classes),
    data_root="../shared/data/bccd/",
    data_prefix=dict(sub_data_root=""),
)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(dataset, ann_file="ImageSets/Main/train.txt", pipeline=train_pipeline),
)
val_dataloader = dict(
    dataset=dict(dataset, ann_file="ImageSets/Main/val.txt", pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="VOCMetric", metric="mAP", eval_mode="area")
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=1, end=24, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=24, val_interval=6)

custom_imports = dict(imports=["tasks.detection"])
local = dict(cut=["layer2.0", "layer3.0", "layer4.0"], auxiliary=dict(type="glcan"))
runner_type = "LocalRunner"
